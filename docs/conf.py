"""The HTML documentation: `sphinx-build -W docs build/docs`, with the extra `docs` installed."""

import pathlib
import re
import shutil
import tomllib

import jax
from sphinx.application import Sphinx
from sphinx.config import Config

import bnp_optax

_ROOT = pathlib.Path(__file__).parents[1]
_PYPROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())
_REPOSITORY = _PYPROJECT["project"]["urls"]["Repository"]

# Otherwise the types of fields are jax.jaxlib._jax.Array.
jax.Array.__qualname__ = "Array"

project = "bnp_optax"
author = "the bnp_optax authors"
project_copyright = f"{author}, under the Apache License 2.0"
release = version = bnp_optax.__version__

extensions = [
  "myst_nb",
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
html_css_files = ["site.css"]
# Copy the input of examples, without prompts and without output.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
# Doctests end with a blank line.
highlight_options = {"python": {"stripnl": True}}
python_use_unqualified_type_names = True

# The notebooks are shown with the outputs that are stored in them.
nb_execution_mode = "off"
nb_render_markdown_format = "gfm"
myst_enable_extensions = ["colon_fence"]
# Links to a section, as GitHub names them.
myst_heading_anchors = 3

# `optax.sgd` in a docstring is a link where there is something to link to.
default_role = "autolink"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Without this, a signature lists the eight alternatives of the type.
autodoc_type_aliases = {"ArrayLike": "ArrayLike", "Mask": "ArrayLike | None"}
# Classes document their fields under Attributes; the signature would list each once more.
autodoc_class_signature = "separated"
autodoc_default_options = {"exclude-members": "__init__, __new__, count, index"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def _copy_notebooks(app: Sphinx, config: Config) -> None:
  """Copy the notebooks below docs/, since Sphinx reads nothing outside of it."""
  target = _ROOT / "docs" / "notebooks"
  shutil.rmtree(target, ignore_errors=True)
  target.mkdir()
  for notebook in (_ROOT / "notebooks").glob("*.ipynb"):
    shutil.copy2(notebook, target)


def _relink(app: Sphinx, docname: str, source: list[str]) -> None:
  """Change links between files of the repository into links between pages of the site."""
  text = re.sub(r"\.\./notebooks/(\w+\.ipynb)", r"notebooks/\1", source[0])
  text = text.replace("](../docs/", "](../").replace("](../README.md", f"]({_REPOSITORY}")
  # The badge is a picture on another host.
  source[0] = re.sub(r"\[!\[(Open in Colab)\]\([^)]*\)\]", r"[\1]", text)


def _locate_source(app, pagename, templatename, context, doctree):  # noqa: ANN001, ANN202
  """Link a notebook to its file in the repository, and not to the copy."""
  if pagename.startswith("notebooks/"):
    context["theme_source_directory"] = "/"


def _shorten_signature(app, what, name, obj, options, signature, returned):  # noqa: ANN001, ANN202
  """Remove Sphinx's wrapper of an alias that stands in a union."""
  if signature:
    return re.sub(r"TypeAliasForwardRef\('([^']*)'\)", r"\1", signature), returned
  return None


def _shorten_fields(app, what, name, obj, options, lines):  # noqa: ANN001, ANN202
  """Write the name of Optax's alias, which Napoleon expands, in the types of fields."""
  for number, line in enumerate(lines):
    if line.startswith("   :type:"):
      lines[number] = re.sub(r"collections\.abc\.Callable\[.*\]", "optax.Schedule", line)


def setup(app: Sphinx) -> None:
  """Connect the functions above to the build."""
  app.connect("config-inited", _copy_notebooks)
  app.connect("source-read", _relink)
  app.connect("html-page-context", _locate_source)
  app.connect("autodoc-process-signature", _shorten_signature)
  app.connect("autodoc-process-docstring", _shorten_fields, priority=900)  # After Napoleon.
