"""The imports between the modules of the library are those that docs/contributing.md lists."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = ROOT / "bnp_optax"


def imported(path):
  """Return the names that a file imports, with modules and what is taken from them."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
  """Return the names that the files of each module import; a package counts as one module."""
  found = {}
  for path in LIBRARY.rglob("*.py"):
    name = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    found.setdefault(name, set()).update(imported(path))
  return found


def imports_within():
  """Return the modules of the library that each module imports."""
  names = {}
  for module, imports in modules().items():
    parts = (name.split(".") for name in imports)
    names[module] = {part[1] for part in parts if part[0] == "bnp_optax"} - {module}
  return names


def test_the_map_lists_every_import():
  text = (ROOT / "docs" / "contributing.md").read_text()
  (table,) = re.findall(r"^\| module \|.*?\n\n", text, re.MULTILINE | re.DOTALL)
  listed = {}
  for line in table.strip().splitlines()[2:]:
    names, _, imports = (re.findall(r"`([\w./]+)`", cell) for cell in line.split("|")[1:4])
    for name in names:
      listed[re.sub(r"\.py$|/$", "", name)] = set(imports)
  actual = imports_within()
  assert set(listed) == set(actual)
  for module, imports in actual.items():
    assert imports <= listed[module], module
  for names in ({"linen", "nnx"}, *({name} for name in listed.keys() - {"linen", "nnx"})):
    assert set.union(*(listed[name] for name in names)) <= set.union(*(actual[n] for n in names))
