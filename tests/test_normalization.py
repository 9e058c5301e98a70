"""Normalization layers against transcriptions of their papers in NumPy, in double precision."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnp_optax import normalization
from bnp_optax.normalization import BatchRenorm, GhostBatchNorm

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
EPSILON, MOMENTUM = 1e-3, 0.9
SCALE, BIAS = RNG.normal(size=8), RNG.normal(size=8)
STEPS = [RNG.normal(loc, scale, (6, 3, 8)) for loc, scale in ((2, 3), (1, 0.2), (-4, 1), (0, 2))]


def apply(norm, stats, x, *, inference=False):
  """Return the outputs and the new running statistics of a layer with SCALE and BIAS."""
  norm_apply = functools.partial(norm.apply, use_running_average=inference, mutable=["batch_stats"])
  variables = {"params": {"scale": SCALE, "bias": BIAS}, "batch_stats": stats}
  y, updates = jax.jit(norm_apply)(variables, x)
  return y, updates["batch_stats"]


def init(norm, x):
  return jax.jit(functools.partial(norm.init, use_running_average=False))(jax.random.key(0), x)


def initial(norm, x):
  variables = init(norm, x)
  np.testing.assert_array_equal(variables["params"]["scale"], np.ones(8))
  np.testing.assert_array_equal(variables["params"]["bias"], np.zeros(8))
  return variables["batch_stats"]


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


def check_gradient(train, frozen, x):
  """Check that the gradient of `train` at x is that of `frozen`, whose statistics are constants."""
  weights = RNG.normal(size=x.shape)
  actual = jax.jit(jax.grad(lambda x: jnp.sum(train(x) * weights)))(x)
  step = 1e-6
  for index in [(0, 0, 0), (1, 2, 3), (5, 1, 7), (3, 0, 4)]:
    change = np.zeros_like(x)
    change[index] = step
    slope = np.sum((frozen(x + change) - frozen(x - change)) * weights) / (2 * step)
    assert actual[index] == pytest.approx(slope, rel=1e-6, abs=1e-8)


# Algorithm 1 of Ioffe (2017), example by example.


def renormalized(x, mu, sigma, r_max, d_max, correction=None):
  m = x.sum((0, 1)) / 18
  s = np.sqrt(EPSILON + ((x - m) ** 2).sum((0, 1)) / 18)
  r, d = correction or (
    np.minimum(np.maximum(s / sigma, 1 / r_max), r_max),
    np.minimum(np.maximum((m - mu) / sigma, -d_max), d_max),
  )
  alpha = 1 - MOMENTUM
  after = mu + alpha * (m - mu), sigma + alpha * (s - sigma)
  return SCALE * ((x - m) / s * r + d) + BIAS, after, (r, d)


@pytest.mark.parametrize("limits", [(1.5, 0.5), (1.0, 0.0), (3.0, 5.0), (math.inf, math.inf)])
def test_batch_renorm(limits):
  norm = BatchRenorm(momentum=MOMENTUM, epsilon=EPSILON, r_max=limits[0], d_max=limits[1])
  stats = initial(norm, STEPS[0])
  mu, sigma = np.zeros(8), np.ones(8)
  step = jax.jit(functools.partial(apply, norm))
  for count, x in enumerate(STEPS, start=1):
    y, stats = step(stats, x)
    expected, (mu, sigma), _ = renormalized(x, mu, sigma, *limits)
    close(y, expected)
    close(stats["mean"], mu)
    close(stats["deviation"], sigma)
    assert stats["count"] == count
  y, after = apply(norm, stats, STEPS[0], inference=True)
  close(y, SCALE * (STEPS[0] - mu) / sigma + BIAS)
  jax.tree.map(np.testing.assert_array_equal, after, stats)


def test_batch_renorm_without_limits_trains_as_it_infers():
  norm = BatchRenorm(r_max=math.inf, d_max=math.inf)
  stats = initial(norm, STEPS[0])
  for x in STEPS:
    inferred, _ = apply(norm, stats, x, inference=True)
    y, stats = apply(norm, stats, x)
    close(y, inferred)


def test_batch_renorm_is_batch_norm_at_first():
  norm, batch_norm = BatchRenorm(epsilon=EPSILON), nn.BatchNorm(epsilon=EPSILON)
  y, _ = apply(norm, initial(norm, STEPS[0]), STEPS[0])
  with jax.numpy_dtype_promotion("standard"):
    expected, _ = apply(batch_norm, {"mean": np.zeros(8), "var": np.ones(8)}, STEPS[0])
  close(y, expected)


def test_batch_renorm_has_no_gradient_through_the_correction():
  norm = BatchRenorm(epsilon=EPSILON, r_max=1.5, d_max=0.5)
  stats, x = initial(norm, STEPS[0]), STEPS[3]
  correction = renormalized(x, np.zeros(8), np.ones(8), 1.5, 0.5)[2]
  # Some are clipped, where there is no gradient anyway; some are not.
  assert 0 < np.sum(np.abs(correction[1]) < 0.5) < 8
  frozen = lambda x: renormalized(x, np.zeros(8), np.ones(8), 1.5, 0.5, correction)[0]
  check_gradient(lambda x: apply(norm, stats, x)[0], frozen, x)


@pytest.mark.parametrize(
  ("count", "r_max", "d_max"),
  [(0, 1, 0), (5000, 1, 0), (22500, 2, 4.375), (40000, 3, 5), (10**6, 3, 5)],
)
def test_batch_renorm_follows_the_schedule_of_the_paper(count, r_max, d_max):
  scheduled, constant = BatchRenorm(), BatchRenorm(r_max=r_max, d_max=d_max)
  stats = initial(scheduled, STEPS[0]) | {"count": jnp.int32(count), "deviation": np.full(8, 0.1)}
  np.testing.assert_allclose(
    apply(scheduled, stats, STEPS[0])[0], apply(constant, stats, STEPS[0])[0], rtol=1e-5
  )


# Summers and Dinneen (2020): sums over ghost batches and groups, and moments E[x] and E[x^2].


def ghost_normalized(x, ghost_size, group_size):
  y = np.empty_like(x)
  for start in range(0, len(x), ghost_size):
    for channel in range(0, 8, group_size):
      part = np.s_[start : start + ghost_size, :, channel : channel + group_size]
      mean, square = x[part].mean(), (x[part] ** 2).mean()
      y[part] = (x[part] - mean) / np.sqrt(square - mean**2 + EPSILON)
  return SCALE * y + BIAS


def ghost_inferred(x, mean, square, group_size, weight):
  y = np.empty_like(x)
  for example in range(len(x)):
    for channel in range(0, 8, group_size):
      group = np.s_[channel : channel + group_size]
      own = x[example, :, group]
      e_x = (1 - weight) * mean[group].mean() + weight * own.mean()
      e_x2 = (1 - weight) * square[group].mean() + weight * (own**2).mean()
      y[example, :, group] = (own - e_x) / np.sqrt(e_x2 - e_x**2 + EPSILON)
  return SCALE * y + BIAS


@pytest.mark.parametrize(
  ("arguments", "ghost_size", "group_size"),
  [
    ({}, 6, 1),
    ({"ghost_size": 2}, 2, 1),
    ({"ghost_size": 7}, 6, 1),
    ({"num_groups": 2}, 6, 4),
    ({"group_size": 2}, 6, 2),
    ({"ghost_size": 3, "num_groups": 4, "example_weight": 0.3}, 3, 2),
    ({"ghost_size": 1, "group_size": 8, "example_weight": 1.0}, 1, 8),
  ],
)
def test_ghost_batch_norm(arguments, ghost_size, group_size):
  norm = GhostBatchNorm(momentum=MOMENTUM, epsilon=EPSILON, **arguments)
  stats = initial(norm, STEPS[0])
  mean, square = np.zeros(8), np.ones(8)
  step = jax.jit(functools.partial(apply, norm))
  for x in STEPS:
    y, stats = step(stats, x)
    close(y, ghost_normalized(x, ghost_size, group_size))
    mean = MOMENTUM * mean + (1 - MOMENTUM) * x.mean((0, 1))
    square = MOMENTUM * square + (1 - MOMENTUM) * (x**2).mean((0, 1))
    close(stats["mean"], mean)
    close(stats["var"], square - mean**2)
  y, after = apply(norm, stats, STEPS[1], inference=True)
  close(y, ghost_inferred(STEPS[1], mean, square, group_size, norm.example_weight))
  jax.tree.map(np.testing.assert_array_equal, after, stats)
  check_gradient(
    lambda x: apply(norm, stats, x)[0], lambda x: ghost_normalized(x, ghost_size, group_size), x
  )


def test_ghost_batch_norm_of_one_example_is_group_norm():
  norm, group_norm = GhostBatchNorm(ghost_size=1, num_groups=4), nn.GroupNorm(4, epsilon=1e-5)
  y, _ = apply(norm, initial(norm, STEPS[0]), STEPS[0])
  with jax.numpy_dtype_promotion("standard"):
    expected = group_norm.apply({"params": {"scale": SCALE, "bias": BIAS}}, STEPS[0])
  close(y, expected)


@pytest.mark.parametrize("norm", [BatchRenorm(), GhostBatchNorm(group_size=2)])
def test_low_precision(norm):
  """Sums are those of float32, though a mean of 100 leaves bfloat16 no digit of a variance."""
  x = jnp.asarray(STEPS[3] + 100, jnp.bfloat16)
  variables = init(norm, x)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {"float32"}
  apply = jax.jit(
    lambda x: norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
  )
  (y, _), (expected, _) = apply(x), apply(x.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize(
  ("norm", "message"),
  [
    (BatchRenorm(r_max=0.5), "BatchRenorm: r_max must be at least 1, not 0.5"),
    (BatchRenorm(d_max=-1.0), "BatchRenorm: d_max must be at least 0, not -1.0"),
    (GhostBatchNorm(ghost_size=4), "6 examples cannot be divided into ghost batches"),
    (GhostBatchNorm(num_groups=3), "8 channels cannot be divided into 3 groups"),
    (GhostBatchNorm(group_size=3), "8 channels cannot be divided into groups of 3"),
    (GhostBatchNorm(num_groups=0), "8 channels cannot be divided into 0 groups"),
    (GhostBatchNorm(num_groups=4, group_size=2), "num_groups or group_size, not both"),
    (GhostBatchNorm(example_weight=1.5), "example_weight must be from 0 to 1, not 1.5"),
  ],
)
def test_wrong_arguments_are_named(norm, message):
  with pytest.raises(ValueError, match=message):
    initial(norm, STEPS[0])


@pytest.mark.parametrize("norm", [BatchRenorm(), GhostBatchNorm()])
def test_integers_are_refused_by_the_layer_they_reach(norm):
  model = nn.Sequential([norm])
  with pytest.raises(TypeError, match="layers_0: inputs must be floating-point numbers, not int32"):
    model.init(jax.random.key(0), np.ones((2, 8), np.int32), use_running_average=False)


def test_scale_and_bias_decay_towards_the_identity():
  layer = {"kernel": RNG.normal(size=(2, 2)), "bias": RNG.normal(size=2)}
  params = {
    "dense": layer,
    "norms": {"first": {"scale": RNG.normal(size=2), "bias": RNG.normal(size=2)}},
    "unbiased": {"scale": RNG.normal(size=2)},
    "embedding": RNG.normal(size=2),
    "weight_norm": layer | {"scale": RNG.normal(size=2)},
  }
  updates = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), params)

  def penalty(params):
    first = params["norms"]["first"]
    return 0.05 * (
      jnp.sum((first["scale"] - 1) ** 2)
      + jnp.sum(first["bias"] ** 2)
      + jnp.sum((params["unbiased"]["scale"] - 1) ** 2)
    )

  tx = normalization.add_decayed_scale_and_bias(0.1)
  actual, _ = jax.jit(tx.update)(updates, tx.init(params), params)
  jax.tree.map(close, actual, jax.tree.map(jnp.add, updates, jax.grad(penalty)(params)))
  with pytest.raises(ValueError, match="needs the parameters"):
    tx.update(updates, tx.init(params))


def test_decay_reaches_scales_and_biases_that_say_how_they_are_split():
  params = {"scale": nn.Partitioned(jnp.full(5, 3.0), ("features",)), "bias": jnp.zeros(5)}
  tx = normalization.add_decayed_scale_and_bias(0.1)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  close(updates["scale"].value, jnp.full(5, 0.2))


@pytest.mark.parametrize(
  ("norm", "axis_type"),
  [
    (BatchRenorm(), jax.sharding.AxisType.Explicit),
    (BatchRenorm(), jax.sharding.AxisType.Auto),
    (GhostBatchNorm(ghost_size=2), jax.sharding.AxisType.Auto),
  ],
)
def test_statistics_are_those_of_the_whole_batch_on_several_devices(norm, axis_type):
  x = STEPS[0]
  mesh = jax.make_mesh((2,), ("batch",), (axis_type,), devices=jax.devices()[:2])
  split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("batch")))
  step = jax.jit(functools.partial(apply, norm))
  jax.tree.map(close, step(initial(norm, x), split), step(initial(norm, x), x))


def test_inference_of_an_empty_batch():
  norm = GhostBatchNorm(ghost_size=2)
  stats = initial(norm, STEPS[0])
  y, after = apply(norm, stats, STEPS[0][:0], inference=True)
  assert y.shape == (0, 3, 8)
  assert {name: x.tolist() for name, x in after.items()} == {
    n: x.tolist() for n, x in stats.items()
  }
