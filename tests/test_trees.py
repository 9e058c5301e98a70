"""Paths and leaves of the trees of parameters that each framework gives."""

import collections

from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnp_optax import LayerStatistics, _trees

Heads = collections.namedtuple("Heads", ["query", "key", "value"])
LINEAR = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
BOXED = nn.Partitioned(np.ones((2, 3)), names=(None, "model"))


@pytest.mark.parametrize(
  ("tree", "paths"),
  [
    ({"b": {"kernel": 1, "bias": 2}, "a": 3}, [("a",), ("b", "bias"), ("b", "kernel")]),
    ({"layers": [{"kernel": 1}, {"kernel": 2}]}, [("layers", str(i), "kernel") for i in (0, 1)]),
    ({"dense": LINEAR}, [("dense", "bias"), ("dense", "kernel")]),
    ({"dense": {"kernel": BOXED, "bias": 1}}, [("dense", "bias"), ("dense", "kernel")]),
    (optax.EmaState(count=1, ema={"kernel": 2}), [("count",), ("ema", "kernel")]),
    (Heads(query=1, key=2, value=3), [("query",), ("key",), ("value",)]),
    (1, [()]),
  ],
  ids=["dictionaries", "lists", "nnx", "boxed", "named tuple", "a field called value", "leaf"],
)
def test_flatten_gives_a_parameter_the_same_path_in_every_framework(tree, paths):
  assert [path for path, _ in _trees.flatten(tree)] == paths


def test_flatten_stops_at_the_given_kinds():
  tree = {"a": optax.MaskedNode(), "b": 1}
  assert _trees.flatten(tree) == [(("b",), 1)]
  assert _trees.flatten(tree, optax.MaskedNode) == [(("a",), optax.MaskedNode()), (("b",), 1)]


def test_masked_nodes_are_leaves():
  leaves, treedef = _trees.flatten_masked({"a": optax.MaskedNode(), "b": 1})
  assert leaves == [optax.MaskedNode(), 1]
  assert treedef.unflatten([2, 3]) == {"a": 2, "b": 3}
  assert [_trees.is_masked(leaf) for leaf in leaves] == [True, False]


def test_by_kernel_takes_the_name_from_the_statistics():
  one = jnp.ones(1)
  plain, other = (LayerStatistics(one, one, one, one, one, kernel=k) for k in ("kernel", "lora_a"))
  tree = {"dense": {"layer_statistics": plain, "user": 1}, "lora": {"layer_statistics_x": other}}
  found = _trees.by_kernel(tree, LayerStatistics)
  assert found == {("dense", "kernel"): plain, ("lora", "lora_a"): other}


def test_unboxed():
  kernel = LINEAR["kernel"].get_value()
  tree = {"boxed": {"kernel": BOXED}, "nnx": LINEAR, "mask": optax.MaskedNode(), "plain": 1}
  actual = _trees.unboxed(tree)
  assert actual["boxed"]["kernel"] is BOXED.value
  assert actual["nnx"]["kernel"] is kernel
  assert (actual["mask"], actual["plain"]) == (optax.MaskedNode(), 1)


def test_split_arrays():
  """A dtype has no shape and is not an array."""
  tree = {"x": np.ones(2), "shape": jax.ShapeDtypeStruct((3,), jnp.int32), "dtype": jnp.float32}
  arrays, rebuild = _trees.split_arrays(tree)
  assert arrays == [tree["shape"], tree["x"]]
  assert rebuild(["new shape", "new x"]) == tree | {"shape": "new shape", "x": "new x"}


def test_show_path():
  assert _trees.show_path(("a", "0", "kernel")) == "a/0/kernel"
  assert _trees.show_path(()) == "(the model itself)"


@pytest.mark.parametrize(
  ("path", "prefix", "expected"),
  [
    (("a", "b", "kernel"), "a/b", True),
    (("a", "b"), "a/b", True),
    (("a", "bc"), "a/b", False),
    (("a",), "a/b", False),
    ((), "", True),
    (("a",), "", True),
  ],
)
def test_has_prefix(path, prefix, expected):
  assert _trees.has_prefix(path, prefix) == expected
