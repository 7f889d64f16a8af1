"""The code of the README and of the recipes runs as written."""

from pathlib import Path

import pytest
from code_blocks import params

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "block",
    [
        *params(ROOT / "README.md"),
        *params(ROOT / "docs" / "recipes.md"),
        *params(ROOT / "docs" / "parking.md"),
    ],
)
def test_code_block(block):
    """Each block runs, after those before it."""
    block.run()
