"""How the documentation is built: `make docs`, pages in docs/_build."""

from importlib import metadata

project = "Sparsight"
release = metadata.version("sparsight")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "Sparsight"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
suppress_warnings = ["myst.xref_missing"]  # README and docs link to files of the repository
