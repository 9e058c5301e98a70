"""What a context replaces: values of its own thread, and attributes of a framework in every one."""

from collections.abc import Callable, Hashable, Iterator
import contextlib
import contextvars
import threading
from typing import Any

import jax

# Makes the replacement of an attribute of a class or module from its value, by owner and name.
Wrappers = dict[tuple[Any, str], Callable[[Any], Any]]

# Part of the key of every cache of traced functions. A function that was traced without statistics,
# or with other ones, is traced again.
_cache_key = jax.make_user_context()
_keys: contextvars.ContextVar[tuple[Hashable, ...]] = contextvars.ContextVar("keys", default=())


@contextlib.contextmanager
def activate(variable: contextvars.ContextVar[Any], value: Any, key: Hashable) -> Iterator[None]:
  """Set a context variable within this context and thread, where the innermost context wins.

  Functions traced under an equal ``key``, also of the contexts around it, are reused.
  """
  keys = (*_keys.get(), key)
  token, keys_token = variable.set(value), _keys.set(keys)
  try:
    with _cache_key(keys):
      yield
  finally:
    variable.reset(token)
    _keys.reset(keys_token)


class Patches:
  """A set of replaced attributes. The originals are restored when the last context closes."""

  def __init__(self) -> None:
    """Replace nothing yet."""
    self._lock = threading.Lock()
    self._originals: dict[tuple[Any, str], Any] = {}
    self._open = 0

  @contextlib.contextmanager
  def applied(self, wrappers: Wrappers) -> Iterator[None]:
    """Replace attributes, each by its wrapper of the original, within this context."""
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
