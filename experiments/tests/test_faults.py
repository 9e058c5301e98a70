"""Tests of full disks, kills and damaged files: an error in one line, and nothing lost."""

import contextlib
import dataclasses
import errno
import gc
import json
import os
import pathlib
import resource

from bnp_experiments import data, session
from bnp_experiments.catalogue import EXPERIMENTS
from bnp_experiments.checkpoints import Checkpoints
from bnp_experiments.errors import DataError, ExperimentError
from bnp_experiments.results import FILE, open_results
import jax
import numpy as np
import pytest

RESULTS = pathlib.Path(__file__).parents[2] / "notebooks" / "results"
SETTINGS = {"method": "bnp", "seeds": [1, 2]}


@contextlib.contextmanager
def full_disk(limit):
  """Limit the size of all files."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Results.


@pytest.mark.parametrize("space", [0, 1, 100])
def test_disk_full_while_results_are_written(tmp_path, space):
  """Earlier records are complete, and the run resumes once there is disk space."""
  record = {"epoch": 2, "train_loss": [0.123456789] * 100}
  with open_results(tmp_path, []) as results:
    results.append({"epoch": 1})
    before = (tmp_path / FILE).read_bytes()
    message = rf"cannot write to .*{FILE}: File too large. .*run again"
    with full_disk(len(before) + space), pytest.raises(ExperimentError, match=message):
      results.append(record)
  assert (tmp_path / FILE).read_bytes() == before
  with open_results(tmp_path, []) as results:
    assert results.find(epoch=1)
    assert not results.find(epoch=2)
    results.append(record)
  assert json.loads((tmp_path / FILE).read_text().splitlines()[-1]) == record


# Checkpoints.


@pytest.fixture
def states():
  """Two states of a run, too large for the folder's own files."""
  rng = np.random.default_rng(0)
  return [{"w": jax.device_put(rng.normal(size=4000).astype(np.float32))} for _ in range(2)]


@pytest.fixture
def checkpoints(tmp_path, states):
  """A folder with the state after one epoch."""
  checkpoints = Checkpoints(tmp_path / "checkpoints", seconds_apart=0)
  checkpoints.save(SETTINGS, 1, states[0])
  return checkpoints


def restore(tmp_path, like):
  """Return the state that a new process would restore."""
  epoch, state = Checkpoints(tmp_path / "checkpoints").restore(SETTINGS, 5, like)
  return epoch, jax.device_get(state["w"])


def test_disk_full_while_a_checkpoint_is_written(tmp_path, checkpoints, states, caplog):
  with (
    pytest.raises(ExperimentError, match=r"cannot keep the state .*File too large.*run again"),
    full_disk(1000),
  ):
    checkpoints.save(SETTINGS, 2, states[1])
  assert not caplog.records
  epoch, w = restore(tmp_path, states[0])
  assert epoch == 1
  np.testing.assert_array_equal(w, states[0]["w"])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_stopped_while_a_checkpoint_is_written(tmp_path, monkeypatch, checkpoints, states, stop):
  """The new state is written but not yet renamed: the state before is the newest."""

  def stopping(*args, **kwargs):
    raise stop

  with monkeypatch.context() as patch:
    patch.setattr(os, "rename", stopping)
    with pytest.raises(stop):
      checkpoints.save(SETTINGS, 2, states[1])
  (place,) = (tmp_path / "checkpoints").iterdir()
  assert len(list(place.iterdir())) == 2
  epoch, w = restore(tmp_path, states[0])
  assert epoch == 1
  np.testing.assert_array_equal(w, states[0]["w"])
  assert [path.name for path in place.iterdir()] == ["1"]


def truncated(folder):
  for path in folder.rglob("d/*"):
    path.write_bytes(path.read_bytes()[:-20])


def without_metadata(folder):
  for path in folder.rglob("_METADATA"):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncated, without_metadata])
def test_a_damaged_checkpoint(tmp_path, checkpoints, states, damage):
  (path,) = (tmp_path / "checkpoints").glob("*/1")
  damage(path)
  with pytest.raises(ExperimentError, match=rf"{path} is damaged, .*Remove it, and run again"):
    restore(tmp_path, states[0])


# Orbax leaves the reads of the other arrays to the garbage collector.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize(
  "like", [{"w": np.zeros(3, np.float32)}, {"v": np.zeros(4000, np.float32)}]
)
def test_a_checkpoint_of_another_version(tmp_path, checkpoints, like):
  with pytest.raises(ExperimentError, match=r"checkpoints.*another version .*Remove it"):
    Checkpoints(tmp_path / "checkpoints").restore(SETTINGS, 5, like)
  gc.collect()


def test_checkpoints_that_cannot_be_written(tmp_path, states):
  (tmp_path / "checkpoints").touch()
  checkpoints = Checkpoints(tmp_path / "checkpoints", seconds_apart=0)
  with pytest.raises(ExperimentError, match=r"cannot keep the state .*Not a directory"):
    checkpoints.save(SETTINGS, 1, states[0])


# Data.


def test_a_read_only_cache_folder(tmp_path, monkeypatch):
  """A folder in which not even the superuser can write, as on a read-only disk."""

  def refuse(*args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setenv("BNP_OPTAX_DATA", str(tmp_path))
  monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
  with pytest.raises(DataError, match=r"mnist.* \(.*Read-only file system\).*BNP_OPTAX_DATA"):
    data.load("mnist")


def test_a_folder_that_tables_cannot_be_written_to(tmp_path, monkeypatch, capsys):
  """The table is shown before the error."""
  folder = RESULTS / "fig9-cifar10-laptop"

  def refuse(*args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr(pathlib.Path, "write_text", refuse)
  with pytest.raises(ExperimentError, match=r"cannot write to .*fig9.*: Read-only file system"):
    session.draw(EXPERIMENTS["fig9"].at("laptop"), folder)
  assert "BatchNorm" in capsys.readouterr().out


def test_settings_without_results_leave_the_tables_as_they_are():
  folder = RESULTS / "fig9-cifar10-laptop"
  other = dataclasses.replace(EXPERIMENTS["fig9"].at("laptop"), epochs=7)
  before = (folder / "fig9.md").read_text()
  with pytest.raises(ExperimentError, match=r"no complete results of fig9 .*7 epochs"):
    session.draw(other, folder)
  assert (folder / "fig9.md").read_text() == before
