"""What the site needs beside Sphinx's own extensions; each file here is one thing."""

from typing import Any

from sphinx.application import Sphinx

from _site import links


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all of it with Sphinx."""
    app.connect("source-read", links.rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
