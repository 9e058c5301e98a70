"""The canonical form of a kernel."""

import functools
import math

import flax.linen as nn
import hypothesis
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax
from bnp_optax._layout import KernelLayout
from tests import unrolled


@st.composite
def layouts(draw):
  """Return any assignment of up to five axes, in any order, and a shape that fits."""
  kinds = draw(st.lists(st.sampled_from(["stack", "window", "feature", "output"]), max_size=5))
  groups = draw(st.integers(1, 3))
  shape = draw(st.lists(st.integers(1, 3), min_size=len(kinds), max_size=len(kinds)))
  axes = draw(st.permutations(range(len(kinds))))
  of = {kind: tuple(a for a in axes if kinds[a] == kind) for kind in set(kinds)}
  fields = ("stack", "window", "feature", "output")
  layout = KernelLayout(**{k: of.get(k, ()) for k in fields}, groups=groups)
  if layout.output:
    shape[layout.output[-1]] *= groups
  else:
    layout = KernelLayout(**{k: of.get(k, ()) for k in fields})
  return layout, tuple(shape)


@pytest.mark.parametrize(
  "roles",
  [
    {"output": (-1,)},
    {"window": (0, 1), "feature": (-2,), "output": (-1,)},
    {"output": (2,)},
    {"output": (0,)},
    {"feature": 0},
    {"feature": [0]},
  ],
)
def test_each_axis_has_one_role(roles):
  with pytest.raises(ValueError, match=r"KernelLayout: stack, .* each axis of the kernel once"):
    KernelLayout(**roles)


def test_stacked_and_moved_keep_the_roles_of_all_axes():
  layout = KernelLayout.by_convention(3)
  assert layout.stacked([1]) == KernelLayout((1,), (0,), (2,), (3,))
  assert layout.stacked([3, 0]) == KernelLayout((3, 0), (1,), (2,), (4,))
  assert layout.moved([2, 0, 1]) == KernelLayout((), (2,), (0,), (1,))
  with pytest.raises(ValueError, match="KernelLayout: stack"):
    layout.stacked([-1])


@given(case=layouts(), seed=st.integers(0, 2**32 - 1))
def test_the_canonical_view_and_back(case, seed):
  layout, shape = case
  rng = np.random.default_rng(seed)
  kernel, bias = rng.normal(size=shape), rng.normal(size=layout.bias_shape(shape))
  w, b = layout.to_canonical(kernel, bias)
  stack, window, feature, output = (
    math.prod(shape[a] for a in axes)
    for axes in (layout.stack, layout.window, layout.feature, layout.output)
  )
  assert w.shape == (stack * layout.groups, window, feature, output // layout.groups)
  assert b.shape == (stack * layout.groups, output // layout.groups)
  back = layout.from_canonical(w, b, shape)
  np.testing.assert_array_equal(back[0], kernel)
  np.testing.assert_array_equal(back[1], bias)


def test_every_entry_lands_where_the_layout_says():
  layout = KernelLayout(stack=(2,), window=(0,), feature=(3,), output=(1,), groups=2)
  kernel = np.arange(3 * 4 * 2 * 5).reshape(3, 4, 2, 5)
  w, _ = layout.to_canonical(kernel, None)
  for k, o, s, f in np.ndindex(*kernel.shape):
    assert w[2 * s + o // 2, k, f, o % 2] == kernel[k, o, s, f]


def test_stacked():
  dense = KernelLayout.by_convention(2)
  assert dense.stacked([1]) == KernelLayout(stack=(1,), feature=(0,), output=(2,))
  twice = KernelLayout(stack=(0,), feature=(1,), output=(2,)).stacked([0])
  assert twice == KernelLayout(stack=(0, 1), feature=(2,), output=(3,))


def test_statistics_shapes():
  layout = KernelLayout.by_convention(4)
  assert layout.statistics_shape((3, 3, 5, 7)) == (5,)
  exact = KernelLayout(window=(0, 1), feature=(2,), output=(3,), groups=2, exact_windows=True)
  assert exact.statistics_shape((3, 3, 5, 8)) == (90,)


# Proposition 10.


@hypothesis.settings(max_examples=max(3, hypothesis.settings.default.max_examples // 5))
@given(
  seed=st.integers(0, 2**32 - 1), half=st.integers(0, 2), size=st.tuples(*[st.integers(5, 8)] * 2)
)
def test_proposition_10(seed, half, size):
  """The mean over the whole map is within the bound of the mean over each window."""
  (r, s), k, x = size, 2 * half + 1, np.random.default_rng(seed).normal(1, 1, (2, *size, 3))
  with jax.enable_x64(True):
    model = nn.Conv(2, (k, k), param_dtype=jnp.float64)
    stats = {}
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(lambda p: np.ones(p.shape), params)

    @functools.partial(jax.jit, static_argnames="exact")
    def statistics(params, x, exact):
      with bnp_optax.linen.sow_statistics(exact_windows=exact):
        _, aux = model.apply(params, x, mutable=["intermediates"])
      found = aux["intermediates"]["layer_statistics"]
      return found.mean, found.variance

    for exact in (False, True):
      stats[exact] = jax.tree.map(np.asarray, statistics(params, x, exact=exact))
  mean, variance = (s.reshape(k * k, 3) for s in stats[True])
  rows = unrolled.windows(x, (k, k), (1, 1), (1, 1), [(half, half)] * 2).reshape(k * k, -1, 3)
  np.testing.assert_allclose(mean, rows.mean(1), rtol=1e-12, atol=1e-13)
  np.testing.assert_allclose(variance, rows.var(1), rtol=1e-12)
  bound = (k - 1) * (1 / (2 * r) + 1 / (2 * s) - (k - 1) / (4 * r * s)) * np.abs(x).max((0, 1, 2))
  assert (np.abs(mean - stats[False][0]) <= bound + 1e-14).all()
