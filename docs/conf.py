"""How Sphinx builds this documentation; see README.md beside this file."""

import re
import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

_setup = ConfigParser()
_setup.read(HERE.parent / "setup.cfg")

project = "cl_merge"
version = release = _setup["metadata"]["version"]
copyright = re.search(r"Copyright \(c\) (.+)", (HERE.parent / "LICENSE").read_text())[1]
author = re.sub(r"^[\d\s-]+", "", copyright)

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_argparse_cli",
    "docstrings",
    "catalogs",
    "mathml",
]
exclude_patterns = ["README.md"]
nitpicky = True
# A name in single backticks, in a docstring or on a page, is a name of the library.
default_role = "py:obj"
# What the library works with is documented elsewhere, and a build asks nothing of the net.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|torchmetrics|lightning|L|nn|np|numpy|PIL|datasets|collections|contextlib|pathlib"
        r"|typing|argparse|transformers)\..+",
    ),
    (
        r"py:.*",
        "Trainer|LightningModule|WeightAveraging|ModelCheckpoint|EarlyStopping|CSVLogger|Path|Tensor"
        "|Sampler|DistributedSampler|ClassLabel|datasets",
    ),
    # Type variables, which are nobody's.
    (r"py:class", r"cl_merge\.(mergers\.chunks\.Result|sampling\.T)"),
]

# Python reference. Docstrings follow Google's style; types stand in the signatures.
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Reference"]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

# Pages. The notebook is shown as it was saved: a test runs it.
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_render_markdown_format = "myst"

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"cl_merge {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
# A browser refuses to fetch excerpts of files: so the search works without a server.
html_show_search_summary = False
html_show_sphinx = False
html_last_updated_fmt = None
html_theme_options = {
    "sidebar_hide_name": False,
    "footer_icons": [],
    "top_of_page_buttons": [],
}
