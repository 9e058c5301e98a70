"""Where each training run has got to, kept on disk so that it can go on from there.

A state is kept at the end of an epoch, unless the last one was kept only seconds before: then it is
cheaper to train that little once more, to the same bits, than to write it down.
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
  """The newest state of each of many training runs, told apart by their settings."""

  def __init__(self, folder: pathlib.Path, seconds_apart: float = 5.0) -> None:
    """Keeps the states in this folder, which need not exist yet."""
    self._folder = folder.absolute()
    self._seconds_apart = seconds_apart
    self._kept_at = time.monotonic()
    self._orbax = ocp.StandardCheckpointer()

  def save(self, settings: dict[str, Any], epoch: int, state: LaneState) -> None:
    """Keeps the state after an epoch, and lets go of the one before it.

    Raises:
      ExperimentError: It cannot be written; the one before it is still there.
    """
    if time.monotonic() - self._kept_at < self._seconds_apart:
      return
    self._kept_at = time.monotonic()
    place = self._place(settings)
    with _explained(
      f"cannot keep the state of the run in {place}",
      "Make room, and run again to go on from the state before",
    ):
      # Orbax waits long for a folder that cannot be made.
      place.mkdir(parents=True, exist_ok=True)
      # It writes elsewhere and moves the whole into place, so a state is there or it is not.
      self._orbax.save(place / str(epoch), state, force=True)
      self._orbax.wait_until_finished()
    for older in place.iterdir():
      if older.name != str(epoch):
        shutil.rmtree(older)

  def restore(
    self, settings: dict[str, Any], epochs: int, like: LaneState
  ) -> tuple[int, LaneState]:
    """The newest state that is kept, if it is from the first `epochs` epochs.

    Args:
      settings: What tells this training run from the others.
      epochs: How many epochs there are results of.
      like: The state before the first epoch.

    Returns:
      The epoch after which the state was kept, and the state; 0 and `like` if there is none.

    Raises:
      ExperimentError: What is there cannot be read, or is not such a state.
    """
    kept = []
    for path in self._place(settings).glob("*"):
      if path.name.isdigit():
        kept.append(int(path.name))
      else:
        # What a killed run was about to move into place.
        shutil.rmtree(path)
    kept = [epoch for epoch in kept if epoch <= epochs]
    if not kept:
      return 0, like
    path = self._place(settings) / str(max(kept))
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with _explained(
      f"{path} is damaged, or was written by another version",
      "Remove it, and run again to train these epochs once more, to the same bits",
    ):
      return max(kept), self._orbax.restore(path, target)

  def _place(self, settings: dict[str, Any]) -> pathlib.Path:
    text = json.dumps(settings, sort_keys=True)
    return self._folder / hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
  """Turns an error of Orbax into one line; Orbax has no errors of its own that one could name."""
  log = logging.getLogger("absl")
  level = log.level
  # What its threads log, with their tracebacks, is raised here too.
  log.setLevel(logging.CRITICAL)
  try:
    yield
  except Exception as error:
    reason = str(error).partition("\n")[0]
    raise ExperimentError(f"{what} ({reason}). {remedy}") from error
  finally:
    log.setLevel(level)
