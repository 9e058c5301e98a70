"""The import graph of the library: which module may import which."""

import ast
import graphlib
import pathlib
import re

import pytest

import bnp_optax

ROOT = pathlib.Path(bnp_optax.__file__).parent
LONGEST = 300


def module_name(path):
  names = path.relative_to(ROOT.parent).with_suffix("").parts
  return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def is_type_checking(node):
  return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(name):
  """Return the full names that a module imports, at any depth, except for type checking."""
  found, nodes = set(), [ast.parse(MODULES[name].read_text())]
  while nodes:
    node = nodes.pop()
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name} has a relative import"
      # What is imported from a package is a module of it, or a name in it.
      names = {f"{node.module}.{alias.name}" for alias in node.names}
      found |= {full if full in MODULES else node.module for full in names}
    nodes += node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)
  return found


def lazy_imports(name):
  """Return the modules that `importlib.import_module` is given by their names."""
  calls = (x for x in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(x, ast.Call))
  lazy = (x for x in calls if ast.unparse(x.func) == "importlib.import_module")
  return {ast.literal_eval(x.args[0]) for x in lazy}


IMPORTS = {name: imports(name) | lazy_imports(name) for name in MODULES}
# The package itself imports everything for the public names, and is imported with each module.
GRAPH = {name: {x for x in IMPORTS[name] if x in MODULES} for name in MODULES}


def ours(name):
  return {x.removeprefix("bnp_optax.") for x in GRAPH[f"bnp_optax.{name}"]}


def reachable(name):
  """Return every name that a module imports, directly or through modules of the library."""
  found, names = set(), [f"bnp_optax.{name}"]
  while names:
    new = IMPORTS.get(names.pop(), set()) - found
    found |= new
    names += new
  return found


def test_there_is_no_cycle():
  assert len(tuple(graphlib.TopologicalSorter(GRAPH).static_order())) == len(MODULES) > 15
  importers = {name for name, found in GRAPH.items() if "bnp_optax" in found}
  assert not importers, "a module imports the public names"


@pytest.mark.parametrize(
  ("name", "allowed"),
  [
    ("_layout", set()),
    ("_preconditioner", set()),
    ("_trees", set()),
    ("_statistics", {"_layout"}),
    ("_calls", {"_layout", "_recurrence"}),
    ("_equations", {"_layout", "_calls"}),
    ("_readers", {"_layout", "_calls", "_equations"}),
    ("_patching", set()),
  ],
)
def test_modules_at_the_bottom(name, allowed):
  assert ours(name) <= allowed


@pytest.mark.parametrize("name", ["_running", "_transform"])
def test_the_transformations_import_no_flax(name):
  packages = {x.split(".")[0] for x in reachable(name)}
  assert "jax" in packages
  assert "flax" not in packages


def test_the_preconditioner_imports_jax_alone():
  assert {x.split(".")[0] for x in reachable("_preconditioner")} == {"typing", "jax"}


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_the_frameworks_do_not_import_the_transformations(name):
  assert not reachable(name) & {"bnp_optax._transform", "bnp_optax._running"}


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_the_experiments_or_benchmarks(name):
  forbidden = {"bnp_experiments", "benchmarks", "tests"}
  for imported in IMPORTS[name]:
    assert not any(imported == x or imported.startswith(f"{x}.") for x in forbidden), imported


def part(name):
  """Return the part of the library that a module belongs to; a package counts as one."""
  return name.split(".")[1] if "." in name else "__init__"


def test_the_map_in_contributing_md_lists_every_import():
  text = (ROOT.parent / "docs" / "contributing.md").read_text()
  (table,) = re.findall(r"^\| module \|.*?\n\n", text, re.MULTILINE | re.DOTALL)
  listed, actual = {}, {part(name): set() for name in MODULES}
  for line in table.strip().splitlines()[2:]:
    names, _, imported = (re.findall(r"`([\w./]+)`", cell) for cell in line.split("|")[1:4])
    listed |= {re.sub(r"\.py$|/$", "", name): set(imported) for name in names}
  for name, imported in GRAPH.items():
    actual[part(name)] |= {part(x) for x in imported} - {part(name)}
  # linen and nnx share a line.
  for imported in (listed, actual):
    imported["linen"] = imported["nnx"] = imported["linen"] | imported["nnx"]
  assert actual == listed


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_long(name):
  assert len(MODULES[name].read_text().splitlines()) <= LONGEST
