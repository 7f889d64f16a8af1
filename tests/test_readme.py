"""The code of the README and of the pages in docs/ runs as written, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
from celery import _state
from code_blocks import params

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]

#: Pages without code that runs.
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

#: A target of a link or picture, up to its anchor, and the anchor.
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


@pytest.fixture(autouse=True, scope="module")
def leave_no_tasks():
    """Celery gives a task of any app to every app that is made later: not to those of other tests."""
    before = set(_state._on_app_finalizers)
    yield
    _state._on_app_finalizers.intersection_update(before)


@pytest.mark.parametrize("block", [block for page in PAGES for block in params(page)])
def test_code_block(block):
    """Each block runs, after those before it on its page."""
    block.run()


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """Each link within the repository leads to a file, and to a heading of it."""
    for target, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            assert anchor in _anchors(file.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.parametrize(
    ("page", "begins"),
    [("settings.md", "| setting |"), ("operate.md", "    celery -A shop limits  ")],
)
def test_what_is_said_twice_is_the_same(page, begins):
    """The README has what its reader needs at once, and a page in docs/ the whole: they do not differ."""
    assert _paragraph(README, begins) == _paragraph(ROOT / "docs" / "howto" / page, begins)


def _paragraph(page, begins):
    """Return the paragraph with a beginning, without the targets of its links."""
    paragraphs = page.read_text(encoding="utf-8").split("\n\n")
    (found,) = [each for each in paragraphs if each.startswith(begins)]
    return re.sub(r"\]\([^)]*\)", "]", found)


def _anchors(text):
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", each).strip().lower().replace(" ", "-") for each in headings]


def test_the_readme_is_short():
    """A stranger reads it to its end: what is longer is a page in docs/."""
    assert len(README.read_text(encoding="utf-8").splitlines()) < 400
