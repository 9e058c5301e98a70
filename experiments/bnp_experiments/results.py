"""The results of a run: JSON lines in a folder, appended as they come and never written twice.

Every line says by itself what it is of, so that a file can be read, filtered and drawn without the
program that wrote it. A run first looks for the lines it is about to make; this is how it goes on
where another one stopped.
"""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import importlib.metadata
import io
import json
import math
import os
import pathlib
import platform
import subprocess
from typing import IO, Any

import jax

from bnp_experiments.errors import ExperimentError, UsageError
import bnp_optax

Record = dict[str, Any]
FILE = "results.jsonl"


class Results:
  """The lines of one results file, read and appended."""

  def __init__(self, path: pathlib.Path, file: IO[bytes], command: list[str]) -> None:
    """Reads the lines; a last one that was cut off while it was written is dropped."""
    self._path = path
    self._file = file
    self._command: list[str] | None = command
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    file.truncate(len(whole))
    self._records = [self._parse(*line) for line in enumerate(whole.splitlines(), 1)]

  def _parse(self, number: int, line: bytes) -> Record:
    try:
      record = json.loads(line)
    except ValueError:
      record = None
    if not isinstance(record, dict):
      raise ExperimentError(
        f"{self._path}, line {number}: not a JSON object. Remove the line, or give another --out."
      )
    return record

  def find(self, **fields: object) -> list[Record]:
    """The records that have all of these fields, oldest first; a None finds what has none."""
    wanted = json.loads(json.dumps(fields)).items()
    return [
      record
      for record in self._records
      if all(record.get(field) == value for field, value in wanted)
    ]

  def append(self, record: Record) -> None:
    """Adds a record, which is out of this process when this returns.

    The first one comes after a record of what made it; a run that adds nothing leaves no trace.

    Raises:
      ExperimentError: The disk is full, or gone; the file is as it was before.
    """
    if self._command is not None:
      command, self._command = self._command, None
      self.append(_header(command))
    line = json.dumps(_without_nan(record), allow_nan=False)
    self._write(line.encode() + b"\n")
    self._records.append(json.loads(line))

  def _write(self, line: bytes) -> None:
    end = self._file.seek(0, os.SEEK_END)
    try:
      while line:
        line = line[self._file.write(line) :]
    except OSError as error:
      self._file.truncate(end)
      raise ExperimentError(
        f"cannot write to {self._path}: {error.strerror}. What is there is whole: make room, and "
        "run again to go on from it"
      ) from error


@contextlib.contextmanager
def open_results(folder: pathlib.Path, command: list[str]) -> Iterator[Results]:
  """Opens the results in a folder for this process alone.

  Args:
    folder: Where they are, or shall be.
    command: What the user called, for the record.

  Yields:
    The results.

  Raises:
    UsageError: The folder cannot be written to, or another process is writing to it.
    ExperimentError: The file holds something that is no result.
  """
  path = folder / FILE
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # Unbuffered: what could not be written must not be tried again when the file is closed.
    file = path.open("a+b", buffering=0)
  except OSError as error:
    raise UsageError(f"cannot write to --out {folder}: {error.strerror}") from error
  with file:
    try:
      # The system gives the lock back when the process ends, however it ends.
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UsageError(
        f"another run is writing to {path}: wait for it, or give another --out"
      ) from error
    yield Results(path, file, command)


@contextlib.contextmanager
def writing_to(folder: pathlib.Path) -> Iterator[None]:
  """Within this context, that a table or a picture cannot be written is an error in one line."""
  try:
    yield
  except OSError as error:
    raise ExperimentError(f"cannot write to {folder}: {error.strerror}") from error


def read_results(folder: pathlib.Path) -> Results:
  """The results in a folder as they are now, even while another process adds to them.

  Raises:
    UsageError: There are none.
    ExperimentError: The file holds something that is no result.
  """
  path = folder / FILE
  try:
    content = path.read_bytes()
  except OSError as error:
    raise UsageError(f"no results in {folder}: {error.strerror}") from error
  return Results(path, io.BytesIO(content), [])


def _header(command: list[str]) -> Record:
  """The record that begins a run: what was called, with what, on what machine."""
  device = jax.devices()[0]
  return {
    "kind": "run",
    "command": command,
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "versions": {
      "python": platform.python_version(),
      "bnp_optax": bnp_optax.__version__,
      **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    },
    "machine": {
      "system": f"{platform.system()} {platform.machine()}",
      "cpus": os.cpu_count(),
      "platform": device.platform,
      "device": device.device_kind,
      "devices": jax.device_count(),
    },
    "git_revision": _git_revision(),
  }


def _git_revision() -> str | None:
  """The commit of the clone that this package runs from, if it runs from one."""
  root = pathlib.Path(__file__).parents[2]
  if not (root / ".git").exists():
    return None

  def git(*arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

  try:
    # Results that are written while this runs change nothing of what makes them.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!notebooks/results")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
  except (OSError, subprocess.CalledProcessError):
    return None


def _without_nan(value: Any) -> Any:
  """JSON has no NaN and no infinity: what diverged is null."""
  if isinstance(value, dict):
    return {key: _without_nan(entry) for key, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_without_nan(entry) for entry in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
