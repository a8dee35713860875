"""References of docstrings, which name an object by the module that defines it, to the page that describes it under its public name.

An object that no page describes is shown by its name, without a link.
"""

import importlib
from functools import reduce
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import NoUri
from sphinx.util import logging


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement) -> nodes.Node | None:
    """Find the public name of an object of pyro_kd, and let Sphinx make the link."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("pyro_kd."):
        return None
    try:
        wanted = find(target)
    except (AttributeError, ImportError):
        logging.getLogger(__name__).warning("there is no %s", target, location=node)
        raise NoUri from None
    domain = env.domains.python_domain
    for name in domain.objects:
        if name.rsplit(".")[-1] == target.rsplit(".")[-1] and find(name) is wanted:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, text)
    raise NoUri


def find(name: str) -> Any:
    """The object with a dotted name: a module, or what a module or a class holds."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[count:], module)
    raise ImportError(name)
