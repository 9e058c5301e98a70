"""Attributes of a framework that are replaced while a context is open in any thread."""

from collections.abc import Callable, Iterator
import contextlib
import threading
from typing import Any

# Makes the replacement of an attribute from its value.
Wrappers = dict[tuple[Any, str], Callable[[Any], Any]]


class Patches:
  """A set of replaced attributes. The originals are restored when the last context closes."""

  def __init__(self) -> None:
    """Replace nothing yet."""
    self._lock = threading.Lock()
    self._originals: dict[tuple[Any, str], Any] = {}
    self._open = 0

  @contextlib.contextmanager
  def applied(self, wrappers: Wrappers) -> Iterator[None]:
    """Replace attributes, each by its wrapper of the original, within this context.

    Args:
      wrappers: Wrapper of each attribute, by its owner, a class or a module, and its name.
    """
    with self._lock:
      for (owner, name), wrap in wrappers.items():
        if (owner, name) not in self._originals:
          original = self._originals[owner, name] = vars(owner)[name]
          setattr(owner, name, wrap(original))
      self._open += 1
    try:
      yield
    finally:
      with self._lock:
        self._open -= 1
        while not self._open and self._originals:
          (owner, name), original = self._originals.popitem()
          setattr(owner, name, original)
