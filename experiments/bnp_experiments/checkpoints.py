"""Checkpoints of the training runs.

A state is saved at the end of an epoch, unless the last one was saved only seconds before.
Repeating so little training, to the same bits, is cheaper than saving.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import json
import logging
import pathlib
import shutil
import time
from typing import Any

import jax
import orbax.checkpoint as ocp

from bnp_experiments.errors import ExperimentError
from bnp_experiments.training import LaneState


class Checkpoints:
  """Stores the newest state of each training run, identified by its settings."""

  def __init__(self, folder: pathlib.Path, seconds_apart: float = 5.0) -> None:
    """Store the states in a folder; it is made if it does not exist."""
    self._folder = folder.absolute()
    self._seconds_apart = seconds_apart
    self._kept_at = time.monotonic()
    self._orbax = ocp.StandardCheckpointer()

  def save(self, settings: dict[str, Any], epoch: int, state: LaneState) -> None:
    """Save the state after an epoch, and remove the one before it.

    Raises:
      ExperimentError: The state cannot be written; the one before it is kept.
    """
    if time.monotonic() - self._kept_at < self._seconds_apart:
      return
    self._kept_at = time.monotonic()
    place = self._place(settings)
    with _explained(
      f"cannot keep the state of the run in {place}",
      "Free some disk space, and run again to resume from the state before",
    ):
      # Orbax would wait long for a folder that cannot be made.
      place.mkdir(parents=True, exist_ok=True)
      # Orbax writes to a temporary folder and renames it, so that no state is incomplete.
      self._orbax.save(place / str(epoch), state, force=True)
      self._orbax.wait_until_finished()
    for older in place.iterdir():
      if older.name != str(epoch):
        shutil.rmtree(older)

  def restore(
    self, settings: dict[str, Any], epochs: int, like: LaneState
  ) -> tuple[int, LaneState]:
    """Restore the newest state of the first `epochs` epochs.

    Args:
      settings: The settings that identify the training run.
      epochs: Number of epochs that have records.
      like: The state before the first epoch.

    Returns:
      The epoch of the state, and the state; 0 and `like` if there is none.

    Raises:
      ExperimentError: The checkpoint cannot be read, or is not such a state.
    """
    kept = []
    for path in self._place(settings).glob("*"):
      if path.name.isdigit():
        kept.append(int(path.name))
      else:
        # The temporary folder of a killed run.
        shutil.rmtree(path)
    kept = [epoch for epoch in kept if epoch <= epochs]
    if not kept:
      return 0, like
    path = self._place(settings) / str(max(kept))
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with _explained(
      f"{path} is damaged, or was written by another version",
      "Remove it, and run again to repeat these epochs, to the same bits",
    ):
      return max(kept), self._orbax.restore(path, target)

  def _place(self, settings: dict[str, Any]) -> pathlib.Path:
    text = json.dumps(settings, sort_keys=True)
    return self._folder / hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
  """Turn an error of Orbax, which may be of any class, into one line."""
  log = logging.getLogger("absl")
  level = log.level
  # Its threads log the same errors, with tracebacks.
  log.setLevel(logging.CRITICAL)
  try:
    yield
  except Exception as error:
    reason = str(error).partition("\n")[0]
    raise ExperimentError(f"{what} ({reason}). {remedy}") from error
  finally:
    log.setLevel(level)
