"""`Reporter`s: merging, nested contexts, threads, and the key of the caches of traced functions."""

import concurrent.futures
import contextvars
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnp_optax import linen, nnx
from bnp_optax._calls import Call
from bnp_optax._layout import KernelLayout
from bnp_optax._patching import activate
from bnp_optax._reporting import Masks, Reporter, eval_shape, statistics_reporter
from bnp_optax._statistics import LayerStatistics, NoStatistics


class Module:
  """A module that keeps what is sown, as Linen's and NNX's do."""

  def __init__(self):
    self.sown = {}

  def sow(self, collection, name, value, *, init_fn, reduce_fn):
    old = self.sown.get((collection, name), init_fn())
    self.sown[collection, name] = reduce_fn(old, value)


def call(*shape, **kwargs):
  size = np.prod(shape)
  inputs = jnp.asarray(np.arange(size, dtype=np.float32).reshape(shape))
  return Call(KernelLayout(), inputs, **kwargs)


def reporter(examples=None, example_axes=1, mask=None, axis_name=None, exact_windows=False):
  return statistics_reporter(
    lambda module, call: ("name",), examples, example_axes, Masks(mask), axis_name, exact_windows
  )


def report(*calls, collection="intermediates", **kwargs):
  """Return what a reporter of statistics sows for calls of one module."""
  module, active = Module(), reporter(**kwargs)
  for each in calls:
    active.report(module, collection, each, None)
  return module.sown


def statistics(*calls, **kwargs):
  ((_, value),) = report(*calls, **kwargs).items()
  return value


# Merging.


def test_a_reporter_merges_the_values_of_one_kernel_and_sows_no_none():
  active = Reporter(lambda module, call: call.rows, lambda old, new: old + new, False)
  module = Module()
  for rows, kernel in ((2, "kernel"), (None, "kernel"), (3, "kernel"), (5, "lora_a")):
    active.report(module, "collection", call(1, 2, rows=rows, kernel=kernel), None)
  assert module.sown == {
    ("collection", "layer_statistics"): 5,
    ("collection", "layer_statistics_lora_a"): 5,
  }


def test_calls_of_a_layer_add_rows_of_the_same_examples():
  once, twice = call(4, 3), call(4, 2, 3)
  merged = statistics(once, twice)
  rows = np.concatenate([once.inputs, np.reshape(twice.inputs, (8, 3))]).astype(np.float64)
  assert (merged.rows, merged.examples) == (12, 4)
  np.testing.assert_allclose(merged.mean, rows.mean(0), rtol=1e-6)
  np.testing.assert_allclose(merged.variance, rows.var(0), rtol=1e-6)
  assert (merged.kernel, merged.layout) == ("kernel", KernelLayout())


def test_a_call_without_statistics_prevails():
  """Of two reasons the first stays."""
  first, second = (call(4, 3, problem=x) for x in ("first", "second"))
  for calls in ((call(4, 3), first), (first, call(4, 3)), (first, second)):
    assert statistics(*calls) == NoStatistics("kernel", "first")


def test_calls_with_two_layouts_have_no_statistics():
  other = Call(KernelLayout(groups=2), jnp.ones((4, 3)))
  merged = statistics(call(4, 3), other)
  assert isinstance(merged, NoStatistics)
  assert "two different meanings" in merged.reason


# Examples, rows and masks.


def test_the_examples_of_the_axes_that_count():
  for example_axes, examples in ((0, 1), (1, 4), (2, 8)):
    found = statistics(call(4, 2, 3), example_axes=example_axes)
    assert (found.examples, found.rows) == (examples, 8)
  found = statistics(call(4, 2, 3, batched=False, rows=5))
  assert (found.examples, found.rows) == (1, 5)


@pytest.mark.parametrize(
  ("mask", "rows", "examples"),
  [
    ([[1, 1], [0, 1], [0, 0]], 3, 2),
    ([1, 0, 0], 2, 1),
    (np.array([[True, True], [False, True], [False, False]]), 3, 2),
  ],
)
def test_an_example_counts_if_any_of_its_positions_does(mask, rows, examples):
  h = call(3, 2, 4)
  found = statistics(h, mask=mask)
  assert (found.rows, found.examples) == (rows, examples)
  present = np.broadcast_to(np.reshape(mask, (3, -1)).astype(bool), (3, 2))
  np.testing.assert_allclose(found.mean, np.asarray(h.inputs)[present].mean(0), rtol=1e-6)


def test_without_the_axes_of_the_positions_an_example_counts_if_any_of_them_does():
  mask = np.array([[True, False], [False, False], [True, True]])
  h = call(3, 4)
  found = statistics(h, mask=mask)
  assert (found.rows, found.examples) == (2, 2)
  np.testing.assert_allclose(found.mean, np.asarray(h.inputs)[[0, 2]].mean(0), rtol=1e-6)
  assert statistics(call(4), mask=mask).rows == 1


def test_a_mask_of_examples_counts_all_positions_of_each():
  found = statistics(call(3, 2, 4), example_axes=2, mask=[1, 0, 1])
  assert (found.rows, found.examples) == (4, 4)


def test_a_mask_of_one_map_is_that_of_its_positions():
  found = statistics(call(3, 4, batched=False), mask=[0, 1, 1])
  assert (found.rows, found.examples) == (2, 1)


@pytest.mark.parametrize("shape", [(5, 2), (5,), (3, 5), (3, 5, 2), (2, 3)])
def test_a_mask_that_does_not_begin_as_the_inputs_is_refused(shape):
  with pytest.raises(ValueError, match=rf"Layer name: the mask of shape \({shape[0]}.*\(3, 2, 4\)"):
    report(call(3, 2, 4), mask=np.ones(shape, bool))


def test_the_longest_prefix_of_whole_names_gives_the_mask():
  masks = Masks({"a": None, "a/b": [0, 1], "": [1, 1]})
  for path, expected in (
    (("a",), None),
    (("a", "b", "c"), [False, True]),
    (("a", "bb"), None),
    (("aa",), [True, True]),
    ((), [True, True]),
  ):
    found = masks.of_call(None, call(1, 1), path)
    assert found is expected is None or list(found) == expected
  masks.check_prefixes()
  assert Masks({"a": [1]}).of_call(None, call(1, 1), ("b",)) is None


def test_prefixes_of_no_layer_are_refused():
  masks = Masks({"a": None, "a/b": None, "c": None, "": None})
  masks.of_call(None, call(1, 1), ("a", "c"))
  with pytest.raises(ValueError, match=r"no layer that was called: a/b, c\."):
    masks.check_prefixes()


def test_a_prefix_within_another_is_that_of_the_same_layer():
  masks = Masks({"a": None, "a/b": None})
  masks.of_call(None, call(1, 1), ("a", "b"))
  masks.check_prefixes()


@pytest.mark.parametrize("mask", [None, [1, 0, 0]])
def test_a_number_of_examples_is_that_of_every_call(mask):
  found = statistics(call(3, 2, 4), call(3, 4), examples=7, mask=mask)
  assert (found.rows, found.examples) == (9 if mask is None else 3, 7)


def test_layers_that_disagree_about_the_number_of_examples():
  with pytest.raises(ValueError, match=r"disagree .*: 3 in layer name and 6 in layer name\. Pass"):
    report(call(3, 4), call(6, 4, kernel="other"))
  parts = lambda x: report(call(3, 4), call(6, 4, kernel="other"), axis_name="data")
  with pytest.raises(ValueError, match=r"divides by, counted in one part along 'data' alone, as"):
    eval_shape(parts, "data", jnp.ones(3))


def test_a_call_without_statistics_counts_no_examples():
  assert len(report(call(6, 4), call(3, 4, kernel="other", problem="none"))) == 2


def test_another_missing_name_gets_no_remedy():
  with pytest.raises(NameError) as error:
    eval_shape(lambda: nonsense, None)  # noqa: F821
  assert not any("axis_name=" in note for note in getattr(error.value, "__notes__", ()))


@pytest.mark.parametrize(
  "options",
  [{"examples": 0}, {"example_axes": -1}, {"examples": "8"}, {"examples": np.ones(1)}],
)
@pytest.mark.parametrize("context", [linen.sow_statistics, nnx.sow_statistics])
def test_numbers_out_of_range(context, options):
  with (
    pytest.raises(ValueError, match="examples= must be a number above 0"),
    context(**options),
  ):
    pass


@pytest.mark.parametrize("context", [linen.sow_statistics, nnx.sow_statistics])
def test_less_than_one_example_in_a_part(context):
  with context(examples=2 / 8):
    pass


def test_no_rows():
  with pytest.raises(ValueError, match=r"Layer name: no rows in its inputs of shape \(0, 3\)"):
    report(call(0, 3))


def test_an_axis_name_sums_over_the_axis():
  h = jnp.arange(12.0).reshape(4, 3)
  one = lambda h: statistics(Call(KernelLayout(), h), example_axes=0, axis_name="batch")
  split = jax.vmap(one, axis_name="batch", out_axes=None)(h)
  whole = statistics(Call(KernelLayout(), h))
  assert (split.examples, split.rows) == (whole.examples, whole.rows) == (4, 4)
  np.testing.assert_allclose(split.variance, whole.variance, rtol=1e-6)


# The key of the caches.


def test_equal_arguments_give_equal_keys():
  mask = np.array([True, False])
  assert reporter(mask=mask).key == reporter(mask=[True, False]).key
  assert hash(reporter(mask=mask).key) == hash(reporter(mask=mask.copy()).key)
  assert reporter().key == reporter().key


@pytest.mark.parametrize(
  "other",
  [
    {"examples": 3},
    {"example_axes": 2},
    {"axis_name": "batch"},
    {"exact_windows": True},
    {"mask": [1, 1]},
    {"mask": [[1, 0]]},
    {"mask": None},
  ],
)
def test_other_arguments_give_other_keys(other):
  arguments = {"mask": [1, 0]}
  assert reporter(**arguments).key != reporter(**(arguments | other)).key


def test_a_traced_mask_has_a_key_that_equals_no_other():
  keys = []

  @jax.jit
  def trace(mask):
    keys.extend(reporter(mask=mask).key for _ in range(2))
    return mask

  trace(np.array([True, False]))
  assert keys[0] != keys[1]
  first, second = (Reporter(lambda m, c: None, lambda a, b: a, False) for _ in range(2))
  assert first.key != second.key


def test_a_function_is_traced_again_under_another_key_alone():
  traces, variable = [], contextvars.ContextVar("variable", default=None)
  function = jax.jit(lambda x: traces.append(variable.get()) or x)
  function(1.0)
  for key in ("a", "b", "a", None):
    if key is None:
      function(1.0)
      continue
    with activate(variable, key, key):
      function(1.0)
  assert traces == [None, "a", "b"]


# Contexts.


def test_the_innermost_context_wins_and_the_outer_one_returns():
  variable = contextvars.ContextVar("variable", default=None)
  with activate(variable, "outer", "outer"):
    with activate(variable, "inner", "inner"):
      assert variable.get() == "inner"
    assert variable.get() == "outer"
    with pytest.raises(KeyError), activate(variable, "inner", "inner"):
      raise KeyError
    assert variable.get() == "outer"
  assert variable.get() is None


def test_a_context_is_of_its_own_thread():
  variable, barrier = contextvars.ContextVar("variable", default=None), threading.Barrier(4)

  def work(i):
    before = variable.get()
    with activate(variable, i, i):
      barrier.wait(timeout=60)
      inside = variable.get()
      barrier.wait(timeout=60)
    return before, inside, variable.get()

  with (
    activate(variable, "main", "main"),
    concurrent.futures.ThreadPoolExecutor(4) as pool,
  ):
    assert list(pool.map(work, range(4))) == [(None, i, None) for i in range(4)]
    assert variable.get() == "main"


def test_statistics_are_a_pytree_beside_their_kernel():
  ((place, value),) = report(call(2, 3, kernel="lora_b"), collection="stats").items()
  assert place == ("stats", "layer_statistics_lora_b")
  assert isinstance(value, LayerStatistics)
  assert value.kernel == "lora_b"
