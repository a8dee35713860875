"""How Sphinx builds the site: `make docs` writes it to build/docs.

The pages are MyST Markdown, which the code host shows too. Pages with a jupytext header are notebooks, and are run. API pages come
from docstrings. docs/_site has what is special here: links out of docs/, pages that show files of the repository, and drawings.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # for notebooks
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm, which Pyro imports, asks for ipywidgets

import pyro_kd  # noqa: E402

project = "pyro_kd"
author = "The pyro_kd developers"
copyright = "the pyro_kd developers"
version = release = pyro_kd.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "_site",
]
exclude_patterns = ["_site"]

# Pages
myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "notebooks")
nb_execution_in_temp = True  # some notebooks write files
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

if any(find_spec(package) is None for package in ("onnxruntime", "onnxscript")):  # the extra `export`
    nb_execution_excludepatterns = ["tutorials/ship_it.md"]

# API
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True

# Looks
html_theme = "pydata_sphinx_theme"
html_title = "pyro_kd"
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system has it
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_sidebars = {page: [] for page in ("contributing", "changelog")}  # they have no section
html_theme_options = {
    "header_links_before_dropdown": 7,
    "navbar_align": "left",
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
