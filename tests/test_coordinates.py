"""`bnp(inner)`: the inner optimizer runs on z, where theta = P z."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from tests import problems

pytestmark = pytest.mark.usefixtures("standard_promotion")

RATE = 1e-2
INNER = {
  "sgd": optax.sgd(RATE),
  "momentum": optax.sgd(RATE, momentum=0.9, nesterov=True),
  "adam": optax.adam(RATE),
  "adamw": optax.adamw(RATE, weight_decay=0.1),
  "lion": optax.lion(RATE),
  "rmsprop": optax.rmsprop(RATE),
  "muon": optax.contrib.muon(RATE),
  "chain": optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1)),
  "schedule": optax.adam(optax.cosine_decay_schedule(RATE, 10)),
  "inject_hyperparams": optax.inject_hyperparams(optax.adam)(RATE),
  "yogi": optax.yogi(RATE),
}


def train(tx, params, batches, model):
  """Train on `batches`; return the parameters after each."""

  @jax.jit
  def step(params, state, batch):
    (_, stats), grads = jax.value_and_grad(problems.loss_fn(model), has_aux=True)(params, batch)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  state, trajectory = tx.init(params), []
  for batch in batches:
    params, state = step(params, state, batch)
    trajectory.append(params)
  return trajectory


@pytest.mark.slow
@pytest.mark.parametrize("model", [problems.MLP(), problems.CNN()], ids=["mlp", "cnn"])
def test_bnp_of_sgd_equals_the_chain(model):
  shape = (8, 5) if isinstance(model, problems.MLP) else (2, 8, 8, 3)
  params, batch = problems.make(model, shape)
  chain = optax.chain(bnp_optax.scale_by_bnp(debias=False), optax.sgd(RATE))
  inside = bnp_optax.bnp(optax.sgd(RATE), debias=False)
  for a, b in zip(*(train(tx, params, [batch] * 5, model) for tx in (chain, inside)), strict=True):
    chex.assert_trees_all_close(a, b, rtol=2e-6, atol=1e-7)


class Vanilla(nn.Module):
  """tanh network in float64; with `statistics`, eq. (2)'s BatchNorm network with these frozen."""

  sizes: tuple[int, ...] = (6, 5, 3)
  statistics: tuple | None = None

  @nn.compact
  def __call__(self, h):
    for i, size in enumerate(self.sizes):
      if self.statistics is not None:
        mu, sigma = self.statistics[i]
        h = (h - mu[None]) / sigma[None]
      h = nn.Dense(size, param_dtype=jnp.float64, name=f"layer_{i}")(h)
      h = nn.tanh(h) if i < len(self.sizes) - 1 else h
    return h


@pytest.mark.parametrize(
  ("name", "rows", "scale_layers"),
  [*((name, 8, True) for name in INNER), ("adam", 2, False), ("muon", 2, False)],
)
def test_it_is_the_inner_optimizer_on_the_batchnorm_network(name, rows, scale_layers):
  """Proposition 7 for any optimizer, over 50 steps with frozen statistics, where q is 1."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    batches = [(rng.normal(2, 1, (rows, 4)), rng.normal(size=(rows, 3))) for _ in range(50)]
    mu = [jnp.asarray(rng.normal(size=n)) for n in (4, 6, 5)]
    sigma2 = [jnp.asarray(rng.lognormal(size=n)) for n in (4, 6, 5)]
    sigma = [jnp.sqrt(s + 1e-2 * jnp.max(s) + 1e-4) for s in sigma2]
    frozen = tuple(zip(mu, sigma, strict=True))

    @jax.jit
    def fold(theta):
      return {
        f"layer_{i}": {
          "kernel": theta[f"layer_{i}"]["kernel"] / s[:, None],
          "bias": theta[f"layer_{i}"]["bias"] - (m / s) @ theta[f"layer_{i}"]["kernel"],
        }
        for i, (m, s) in enumerate(frozen)
      }

    theta = {
      f"layer_{i}": {"kernel": rng.normal(size=(n, m)) / np.sqrt(n), "bias": np.zeros(m)}
      for i, (n, m) in enumerate(((4, 6), (6, 5), (5, 3)))
    }
    inner = INNER[name]
    tx = bnp_optax.bnp(inner, decay=1 - 1e-16, debias=False, scale_layers=scale_layers)
    params = fold(theta)
    state = tx.init(params)
    # The statistics are set, and a decay of almost 1 keeps them, to the last digit.
    kernels = lambda arrays: {
      f"layer_{i}": {"kernel": x, "bias": optax.MaskedNode()} for i, x in enumerate(arrays)
    }
    statistics = state.statistics._replace(input_mean=kernels(mu), input_variance=kernels(sigma2))
    state = state._replace(statistics=statistics)
    inner_state = inner.init(theta)

    @jax.jit
    def step(params, state, theta, inner_state, batch):
      loss = problems.loss_fn(Vanilla())
      (_, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
      updates, state = tx.update(grads, state, params, stats=stats)
      params = optax.apply_updates(params, updates)

      loss = problems.loss_fn(Vanilla(statistics=frozen))
      (_, _), grads = jax.value_and_grad(loss, has_aux=True)(theta, batch)
      updates, inner_state = inner.update(grads, inner_state, theta)
      return params, state, optax.apply_updates(theta, updates), inner_state

    for batch in batches:
      params, state, theta, inner_state = step(params, state, theta, inner_state, batch)
    chex.assert_trees_all_close(params, fold(theta), rtol=1e-12, atol=1e-12)


def test_an_inner_optimizer_reads_z():
  """An optimizer that reads parameters is given P^-1 theta; P maps it back to theta."""
  with jax.enable_x64(True):
    params, batch = problems.make(problems.MLP(jnp.float64), (8, 5), jnp.float64)
    grads, stats = problems.grads_and_stats(problems.MLP(jnp.float64), params, batch)
    read = optax.stateless(lambda updates, z: z)
    tx = bnp_optax.bnp(read, debias=False)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)
    chex.assert_trees_all_close(updates, params, rtol=1e-12, atol=1e-15)


def test_extra_arguments_reach_the_inner_optimizer():
  def update(updates, state, params=None, *, factor, **extra_args):
    assert "stats" not in extra_args
    return jax.tree.map(lambda u: factor * u, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  params, batch = problems.make(problems.MLP(), (8, 5))
  grads, stats = problems.grads_and_stats(problems.MLP(), params, batch)
  tx = bnp_optax.bnp(inner, debias=False)
  update = jax.jit(tx.update)
  once, twice = (
    update(grads, tx.init(params), params, stats=stats, factor=factor)[0] for factor in (1.0, 2.0)
  )
  chex.assert_trees_all_close(twice, jax.tree.map(lambda u: 2 * u, once), rtol=1e-6)


@pytest.mark.parametrize(
  "inner",
  [
    optax.contrib.schedule_free(optax.sgd(RATE), RATE),
    optax.contrib.mechanize(optax.sgd(RATE)),
    optax.contrib.prodigy(),
    optax.contrib.dog(RATE),
    optax.contrib.dowg(),
    optax.chain(optax.clip(1.0), optax.contrib.cocob()),
    optax.contrib.madgrad(RATE),
    optax.scale_by_lbfgs(),
  ],
  ids=["schedule_free", "mechanize", "prodigy", "dog", "dowg", "cocob", "madgrad", "lbfgs"],
)
def test_an_inner_optimizer_that_keeps_parameters_is_refused(inner):
  params, _ = problems.make(problems.MLP(), (8, 5))
  with pytest.raises(ValueError, match=r"keeps a copy of the parameters.*Put BNP inside"):
    jax.eval_shape(bnp_optax.bnp(inner, debias=False).init, params)


@pytest.mark.slow
def test_a_line_search_goes_after_bnp():
  """Inside, it would evaluate the loss at z; after BNP, it finds a rate in theta."""
  model = problems.MLP()
  params, batch = problems.make(model, (8, 5))
  loss_fn = jax.jit(problems.loss_fn(model))
  (value, stats), grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch)

  def value_fn(params, stats=None):
    del stats
    return loss_fn(params, batch)[0]

  search = optax.scale_by_backtracking_linesearch(15)
  arguments = {"stats": stats, "value": value, "grad": grad, "value_fn": value_fn}
  inside = bnp_optax.bnp(optax.chain(optax.sgd(1.0), search), debias=False)
  with pytest.raises(ValueError, match=r"value_fn= or grad=.*Put the line search after BNP"):
    inside.update(grad, inside.init(params), params, **arguments)
  for tx in (bnp_optax.scale_by_bnp(debias=False), bnp_optax.bnp(optax.scale_by_adam())):
    after = optax.chain(tx, optax.scale(-1.0), search)
    step = jax.jit(lambda after=after: after.update(grad, after.init(params), params, **arguments))
    updates, _ = step()
    assert value_fn(optax.apply_updates(params, updates)) < value


def test_a_copy_in_moving_coordinates_would_be_wrong():
  """The reason for the error above: z of the same parameters changes with the statistics."""
  params, batch = problems.make(problems.MLP(), (8, 5))
  grads, stats = problems.grads_and_stats(problems.MLP(), params, batch)

  @jax.jit
  def update(state):
    coordinates = []
    recorder = optax.stateless(lambda updates, z: (coordinates.append(z), updates)[1])
    _, state = bnp_optax.bnp(recorder, debias=False).update(grads, state, params, stats=stats)
    return coordinates[0], state

  before, state = update(bnp_optax.bnp(optax.identity(), debias=False).init(params))
  after, _ = update(state)
  moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), before, after)
  assert moved["first"]["bias"] > 1e-3


def test_hyperparameters_are_checked():
  with pytest.raises(ValueError, match="decay must be in"):
    bnp_optax.bnp(optax.sgd(RATE), decay=1.0, debias=False)
