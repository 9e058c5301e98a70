"""`LayerStatistics` are sums: they merge by "+", and lose nothing to cancellation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnp_optax import _statistics
from tests.compiling import AS_USERS_DO


@functools.partial(jax.jit, static_argnames=("examples",), compiler_options=AS_USERS_DO)
def statistics_of(h, examples=None, mask=None):
  rows = int(np.prod(h.shape[:-1]))
  examples = h.shape[0] if examples is None else examples
  return _statistics.layer_statistics(h, examples=examples, rows=rows, mask=mask)


def add(*statistics):
  return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *statistics)


@pytest.mark.parametrize("shape", [(7, 3), (4, 5, 3), (2, 3, 4, 3)])
def test_mean_variance_and_second_moment(shape):
  h = np.random.default_rng(0).normal(2, [0.1, 1, 10], shape)
  statistics = statistics_of(jnp.asarray(h, jnp.float32))
  axes = tuple(range(len(shape) - 1))
  np.testing.assert_allclose(statistics.mean, h.mean(axes), rtol=1e-5)
  np.testing.assert_allclose(statistics.variance, h.var(axes), rtol=1e-5)
  np.testing.assert_allclose(statistics.mean_square, (h**2).mean(axes), rtol=1e-5)
  assert (statistics.examples, statistics.rows) == (shape[0], float(np.prod(shape[:-1])))


@pytest.mark.parametrize("splits", [(1, 5), (3, 4, 8), range(1, 12)])
def test_any_split_of_a_batch_adds_up_to_the_whole(splits):
  h = np.random.default_rng(1).normal(3, [0.1, 1, 10], (12, 4, 3))
  with jax.enable_x64(True):
    whole = statistics_of(h)
    parts = add(*(statistics_of(part) for part in np.split(h, list(splits))))
    assert (parts.examples, parts.rows) == (whole.examples, whole.rows)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(parts.variance, whole.variance, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_large_mean_in_half_precision(dtype):
  """E[h^2] - E[h]^2 in bfloat16 gave 0 here."""
  h = jnp.asarray(np.random.default_rng(2).normal(100, 1, (256, 2)), dtype)
  statistics = statistics_of(h)
  assert statistics.variance.dtype == jnp.float32
  np.testing.assert_allclose(statistics.variance, np.var(np.asarray(h, np.float64), 0), rtol=1e-5)


@pytest.mark.parametrize("ratio", [1e1, 1e2, 1e3, 1e4, 1e5])
def test_one_batch_loses_nothing_to_cancellation(ratio):
  """In float32, with a mean of `ratio` deviations; the inputs themselves are exact."""
  h = np.float32(ratio) + np.random.default_rng(3).integers(-2, 3, (64, 3)).astype(np.float32)
  variance = statistics_of(jnp.asarray(h)).variance
  # The mean is rounded, and its error enters the variance squared.
  bound = 1e-6 + (ratio * np.finfo(np.float32).eps) ** 2
  np.testing.assert_allclose(variance, np.var(h.astype(np.float64), 0), rtol=bound)


def test_the_rounding_of_a_large_mean_is_not_taken_for_variance():
  """Compiled apart, sums and quotients may round differently; a constant keeps variance 0."""
  statistics = statistics_of(np.full((3, 1), 1e6 / 7, np.float32))
  variance = jax.jit(lambda s: s.variance, compiler_options=AS_USERS_DO)(statistics)
  assert variance == statistics.within / 3


def test_the_variance_of_single_rows_is_not_taken_for_rounding():
  h = (100 + np.random.default_rng(6).normal(size=(64, 3))).astype(np.float32)
  variance = add(*map(statistics_of, h[:, None])).variance
  np.testing.assert_allclose(variance, h.var(0, dtype=np.float64), rtol=0.02)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.bool_])
def test_integers_and_booleans(dtype):
  statistics = statistics_of(jnp.asarray([[0, 1], [1, 1], [1, 1]], dtype))
  np.testing.assert_allclose(statistics.mean, [2 / 3, 1], rtol=1e-6)
  np.testing.assert_allclose(statistics.variance, [2 / 9, 0], rtol=1e-6)


def test_padding_is_ignored():
  h = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 4)), jnp.float32)
  mask = jnp.asarray([[True, True, False], [True, False, False]])
  valid = statistics_of(h[mask], examples=2)
  masked = statistics_of(jnp.where(mask[..., None], h, jnp.nan), mask=mask)
  assert masked.rows == 3
  np.testing.assert_allclose(masked.mean, valid.mean, rtol=1e-6)
  np.testing.assert_allclose(masked.variance, valid.variance, rtol=1e-6)


def test_a_mask_of_numbers_counts_what_is_not_zero():
  h = jnp.arange(6.0).reshape(3, 2)
  numbers = statistics_of(h, mask=np.array([2, 1, 0]))
  chex.assert_trees_all_equal(numbers, statistics_of(h, mask=jnp.array([True, True, False])))


def test_a_mask_without_the_leading_shape():
  with pytest.raises(ValueError, match=r"mask has shape \(2,\), and .* leading shape \(2, 3\)"):
    statistics_of(jnp.ones((2, 3, 4)), mask=jnp.array([True, False]))


def test_a_part_that_is_padding_alone_adds_nothing():
  h = jnp.asarray(np.random.default_rng(0).normal(3, 1, (4, 3)), jnp.float32)
  part, padding = (statistics_of(h, mask=jnp.full(4, there)) for there in (True, False))
  both = add(part, padding)
  np.testing.assert_array_equal(both.mean, part.mean)
  np.testing.assert_allclose(both.variance, part.variance, rtol=1e-6)
  assert np.isnan(padding.mean).all()


def test_calls_of_a_layer_add_rows_of_the_same_examples():
  h = jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)), jnp.float32)
  twice = _statistics.merge_two_calls(statistics_of(h), statistics_of(h + 1))
  assert (twice.examples, twice.rows) == (4, 8)
  both = np.concatenate([h, h + 1])
  np.testing.assert_allclose(twice.variance, both.var(0), rtol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2)])
def test_the_examples_of_two_calls_are_the_larger_number(sizes):
  calls = [statistics_of(np.ones((size, 3), np.float32)) for size in sizes]
  assert _statistics.merge_two_calls(*calls).examples == 4


def test_a_call_without_statistics_leaves_the_layer_without():
  some, none = statistics_of(np.ones((4, 3), np.float32)), _statistics.NoStatistics("kernel", "why")
  for calls in ((some, none), (none, some)):
    assert _statistics.merge_two_calls(*calls) is none
