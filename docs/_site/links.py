"""Links of the pages, which are written for the code host, as the site has them; and pages that show a file of the repository.

A page of docs/ links to files outside of docs/ by relative paths. Some of these files are pages of the site too: their page in docs/
is one line with a link to the file, and the site shows the file. Links to other files become their text.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]

# The page of the site that shows a file of the repository.
SHOWN = {"CONTRIBUTING.md": "docs/contributing.md", "CHANGELOG.md": "docs/changelog.md"}
# The page of the site that says the same as a file of the repository.
SAME = {"README.md": "docs/index.md"}

_PAGE = re.compile(r"(?<!`)docs/(\w+)\.md(?![#`])")
_FIGURE = re.compile(r"(?<=\d) ± (?=\d)(?=[^\n]*\|$)", re.M)  # in a table, where it must not be broken into two lines
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:|#)([^)\s#]+)(#[\w-]+)?\)")


def rewrite(app: "Sphinx", page: str, source: list[str]) -> None:
    """Change the text of a page before Sphinx parses it."""
    place = f"docs/{page}.md"
    shown = {at: file for file, at in SHOWN.items()}.get(place)
    text = (DOCS.parent / shown).read_text(encoding="utf-8") if shown else source[0]
    source[0] = _FIGURE.sub("\u00a0±\u00a0", for_site(text, shown or place, place))


def link_pages(app: "Sphinx", what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Make links of the pages that a docstring names, but not of those in messages of errors."""
    lines[:] = [_PAGE.sub(r":doc:`docs/\1.md </\1>`", line) for line in lines]


def for_site(text: str, written_in: str, place: str) -> str:
    """The Markdown of a file, with links that are right on the page where the site shows it; both are paths from the root."""

    def link(match: re.Match[str]) -> str:
        picture, label, target, anchor = match.groups()
        path = normpath(str(PurePosixPath(written_in).parent / target))
        path, anchor = (SAME[path], "") if path in SAME else (SHOWN.get(path, path), anchor or "")
        if not path.startswith("docs/"):
            return label
        return f"{picture}[{label}]({relpath(path, PurePosixPath(place).parent)}{anchor})"

    return _LINK.sub(link, text)
