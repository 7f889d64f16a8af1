"""What the site needs beyond mkdocs: links that leave docs/, and no other host.

In a checkout, and where the repository is shown, links to other files of the repository are relative. On the site
they go to the repository. A file that is not there ends the build, and so does a
page that loads anything from another host.
"""

import os.path
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

#: The target of a link or picture, up to its anchor.
_TARGET = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")

#: What a browser loads by itself.
_LOADED = re.compile(
    r"""<(?:script|img|iframe|link(?=[^>]*stylesheet))[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*>"""
)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Lead the links of a page that leave docs/ to where their files are."""
    docs, here = Path(config.docs_dir), Path(page.file.abs_src_path).parent

    def there(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(here / match[1]))
        if target.is_relative_to(docs):
            return match[1]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: no such file: {match[1]}")
        path = target.relative_to(ROOT).as_posix()
        return f"{REPOSITORY}/blob/main/{path}"

    return _TARGET.sub(there, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Take away one of the two colons that a docstring has before code."""
    return html.replace("::</p>", ":</p>")


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Look for what would be loaded from another host."""
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output
