"""The committed results of the benchmarks, and what is made of them; no benchmark runs here."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = max(
    (json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")),
    key=lambda results: results["about"]["date"],
)


def module(name):
    """Import a file of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


PICTURES = module("pictures")


@pytest.mark.parametrize("name", PICTURES.LOOKS)
def test_a_picture_is_drawn_from_the_last_results(name):
    """The pictures that the documentation shows have the numbers of the last committed run."""
    svg = PICTURES.drawn(RESULTS)[name]
    assert svg == (ROOT / "docs" / "pictures" / f"{name}.svg").read_text()
    assert "nan" not in svg
    words = [each.text for each in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    curves = PICTURES.LOOKS[name].curves.values()
    assert {curve.words.format(**RESULTS["pictures"][name]) for curve in curves} <= set(words)


def test_a_picture_of_nothing_is_drawn():
    """A run in which no job ran has a picture too."""
    data = RESULTS["pictures"]["rate"]
    curves = {name: [0] * len(values) for name, values in data["curves"].items()}
    ET.fromstring(PICTURES.draw(PICTURES.LOOKS["rate"], data | {"curves": curves}, RESULTS["about"]))


def test_the_parts_of_the_results_are_there():
    """A run without names finds all that it measures, and the names in the results are still names of parts."""
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert set(RESULTS["parts"]) <= set(listed)
