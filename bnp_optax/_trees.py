"""Paths and leaves of parameter trees, in the form that each framework gives them."""

from collections.abc import Callable
from typing import Any

import jax
import optax

Path = tuple[str, ...]

# An NNX variable, or a parameter with metadata, is a pytree node with its value as the only child.
_BOXED = (jax.tree_util.GetAttrKey("value"),)


def flatten(tree: Any, *kinds: type) -> list[tuple[Path, Any]]:
  """Return the leaves of a tree with their paths; instances of ``kinds`` count as leaves.

  A parameter has the same path in the trees of every framework.
  """
  tree = unboxed(tree)
  keys = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, kinds))[0]
  return [(name_path(path), leaf) for path, leaf in keys]


def flatten_masked(tree: Any) -> tuple[list[Any], Any]:
  """Return the leaves and the structure of a tree, with `optax.MaskedNode` as a leaf."""
  return jax.tree.flatten(tree, is_leaf=is_masked)


def is_masked(x: Any) -> bool:
  """Return True for the node that `optax.masked` puts in the place of a leaf."""
  return isinstance(x, optax.MaskedNode)


def by_kernel(tree: Any, *kinds: type) -> dict[Path, Any]:
  """Return the instances of ``kinds`` in a tree, by the path of the kernel they belong to."""
  found: dict[Path, Any] = {}
  for path, x in flatten(tree, *kinds):
    if isinstance(x, kinds) and found.setdefault((*path[:-1], x.kernel), x) is not x:
      raise ValueError(
        f"Layer {show_path(path[:-1])}: there are two statistics of its {x.kernel}. Merge those of "
        "several calls with bnp_optax.merge_calls."
      )
  return found


def name_path(keys: tuple[Any, ...]) -> Path:
  """Return the names along a path of JAX's keys in a tree without boxes."""
  return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def unboxed(tree: Any) -> Any:
  """Return a tree with each box replaced by its value.

  The metadata in a box describe a kernel, for example its sharding. They do not apply to a mean.
  """

  def value(x: Any) -> Any:
    children = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)[0]
    return children[0][1] if [keys for keys, _ in children] == [_BOXED] else x

  return jax.tree.map(value, tree, is_leaf=lambda x: value(x) is not x)


def is_array(x: Any) -> bool:
  """Return True for an array or its description, not for a dtype such as ``np.float32``."""
  return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
  """Return the arrays of a tree, and a function that puts other arrays in their place."""
  leaves, treedef = jax.tree.flatten(tree)
  indices = [i for i, x in enumerate(leaves) if is_array(x)]

  def rebuild(arrays: list[Any]) -> Any:
    filled = dict(enumerate(leaves)) | dict(zip(indices, arrays, strict=True))
    return treedef.unflatten(filled.values())

  return [leaves[i] for i in indices], rebuild


def has_prefix(path: Path, prefix: str) -> bool:
  """Return True if a path begins with the whole names of a prefix such as ``"encoder/layer_0"``."""
  return not prefix or f"{'/'.join(path)}/".startswith(f"{prefix.rstrip('/')}/")


def show_path(path: Path) -> str:
  """Return a path as errors and tables print it."""
  return "/".join(path) or "(the model itself)"
