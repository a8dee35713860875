"""The pages of the documentation as text: their headings, links and tables of contents, as the code host and the site read them."""

import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath

from tests.support.package_files import ROOT

DOCS = ROOT / "docs"


def pages() -> list[Path]:
    """All pages of the site, and the files of the repository that the code host shows."""
    shown = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return shown + sorted(path for path in DOCS.rglob("*.md") if not path.is_relative_to(DOCS / "_site"))


def without_code(text: str) -> str:
    """The text of a page without fences, indented blocks and inline code, in which nothing is a link or a heading."""
    text = re.sub(r"^(`{3,}).*?^\1`*$", "", text, flags=re.M | re.S)
    text = re.sub(r"(?:(?<=\n\n)|\A)(?: {4}.*\n+)+", "", text)
    return re.sub(r"`[^`\n]+`(?!\])", lambda code: code[0] if "](" not in code[0] else "", text)


def anchors(text: str) -> set[str]:
    """What links to the headings of a page end with: their words in small letters, with hyphens."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+?)\s*$", without_code(text), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found | set(re.findall(r"^\(([\w-]+)\)=$", text, re.M))


def links(text: str) -> list[str]:
    """The targets of all links and pictures that are not addresses."""
    found = re.findall(r"\]\(\s*<?([^()\s<>]+)>?(?:\s+\"[^\"]*\")?\s*\)", without_code(text))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def broken(path: Path) -> Iterator[str]:
    """Each link of a page that leads nowhere."""
    text = path.read_text(encoding="utf-8")
    for link in links(text):
        target, _, anchor = link.partition("#")
        to = path.parent / target if target else path
        if not to.exists():
            yield f"{path.relative_to(ROOT)}: there is no {link}"
        elif anchor and anchor not in anchors(to.read_text(encoding="utf-8")):
            yield f"{path.relative_to(ROOT)}: there is no heading {link}"


def contents(page: str, text: str) -> list[str]:
    """The pages in the tables of contents of a page; both are paths in docs/, without their ending."""
    found = []
    for body in re.findall(r"^`{3,}\{toctree\}\n(.*?)^`{3,}", text, re.M | re.S):
        is_glob = ":glob:" in body
        for entry in [line.strip() for line in body.splitlines() if line.strip() and not line.startswith(":")]:
            name = normpath(f"{page}/../{entry.rpartition('<')[2].rstrip('>')}")
            if is_glob and "*" in entry:
                listed = [str(path.relative_to(DOCS).with_suffix("")) for path in sorted(DOCS.glob(f"{name}.md"))]
                found += [one for one in listed if one != page and one not in found]
            else:
                found.append(name)
    return found
