"""The HTML documentation: `sphinx-build -W docs build/docs`, with the extra `docs` installed."""

import bnp_optax

project = "bnp_optax"
author = "the bnp_optax authors"
release = version = bnp_optax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"bnp_optax {release}"

myst_enable_extensions = ["colon_fence"]
# Links to a section, as GitHub names them.
myst_heading_anchors = 3

# `optax.sgd` in a docstring is a link where there is something to link to.
default_role = "autolink"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Without this, a signature lists the eight alternatives of the type.
autodoc_type_aliases = {"ArrayLike": "jax.typing.ArrayLike", "Mask": "jax.typing.ArrayLike | None"}
# Classes document their fields under Attributes; the signature would list each once more.
autodoc_class_signature = "separated"
autodoc_default_options = {"exclude-members": "__init__, __new__, count, index"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
