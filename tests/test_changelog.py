"""The changelog and the files that repeat the version and the address of the project."""

import pathlib
import re
import tomllib

from packaging.version import Version

import bnp_optax

ROOT = pathlib.Path(__file__).parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
HEADING = re.compile(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", re.MULTILINE)


def sections():
  """Return the name and the date of each section of the changelog, newest first."""
  text = (ROOT / "CHANGELOG.md").read_text()
  found = HEADING.findall(text)
  assert len(found) == len(re.findall(r"^## ", text, re.MULTILINE))
  return found


def cited(field):
  """Return a field of CITATION.cff."""
  (value,) = re.findall(rf'^{field}: "?(.+?)"?$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
  return value


def test_the_version_is_the_newest_release_or_a_development_version_after_it():
  released = [Version(name) for name, _ in sections() if name != "Unreleased"]
  version = Version(bnp_optax.__version__)
  if version.is_devrelease:
    assert sections()[0][0] == "Unreleased"
    assert version > released[0]
  else:
    assert version == released[0]


def test_releases_are_dated_and_in_order():
  first, *others = sections()
  released = others if first[0] == "Unreleased" else [first, *others]
  versions, dates = [Version(name) for name, _ in released], [date for _, date in released]
  assert all(dates)
  assert versions == sorted(set(versions), reverse=True)
  assert dates == sorted(dates, reverse=True)


def test_the_citation_names_the_version_and_the_address():
  assert cited("version") == bnp_optax.__version__
  assert cited("repository-code") == REPOSITORY


def test_the_badges_of_the_readme_link_to_the_address():
  slug = REPOSITORY.removeprefix("https://github.com/")
  links = re.findall(
    r"\((https://colab\.research\.google\.com/github/[^)]+)\)", (ROOT / "README.md").read_text()
  )
  notebooks = sorted(path.name for path in ROOT.glob("notebooks/*.ipynb"))
  base = f"https://colab.research.google.com/github/{slug}/blob/main/notebooks"
  assert sorted(links) == [f"{base}/{name}" for name in notebooks]
