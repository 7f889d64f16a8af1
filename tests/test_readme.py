"""The README's code runs as written."""

from pathlib import Path

import pytest
from code_blocks import params

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("block", params(README))
def test_code_block(block):
    """Each block runs, after those before it."""
    block.run()
