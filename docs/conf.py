"""The HTML documentation: `sphinx-build -W docs build/docs`, with the extra `docs` installed."""

import pathlib
import tomllib

import bnp_optax

_PYPROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"
_REPOSITORY = tomllib.loads(_PYPROJECT.read_text())["project"]["urls"]["Repository"]

project = "bnp_optax"
author = "the bnp_optax authors"
project_copyright = f"{author}, under the Apache License 2.0"
release = version = bnp_optax.__version__

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.napoleon",
  "sphinx_copybutton",
  "sphinx-mathjax-offline",
]
html_theme = "furo"
html_title = f"bnp_optax {release}"
html_theme_options = {
  "source_repository": _REPOSITORY,
  "source_branch": "main",
  "source_directory": "docs/",
  "footer_icons": [
    {"name": "Repository", "url": _REPOSITORY, "html": "Repository", "class": ""},
  ],
}
html_static_path = ["static"]
html_css_files = ["wide_tables.css"]
# Copy the input of examples, without prompts and without output.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
python_use_unqualified_type_names = True

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
