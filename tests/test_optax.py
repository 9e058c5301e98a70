"""BNP within Optax: the contract of its own optimizers, and every wrapper of it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from tests import problems

pytestmark = pytest.mark.usefixtures("standard_promotion")

RATE = 1e-2
MODEL = problems.MLP()
OPTIMIZERS = {
  "scale_by_bnp": lambda **kwargs: bnp_optax.scale_by_bnp(**kwargs),
  **{
    name: lambda inner=inner, **kwargs: bnp_optax.bnp(inner, **kwargs)
    for name, inner in {
      "sgd": optax.sgd(RATE),
      "momentum": optax.sgd(RATE, momentum=0.9),
      "adam": optax.adam(RATE),
      "adamw": optax.adamw(RATE),
      "lion": optax.lion(RATE),
      "rmsprop": optax.rmsprop(RATE),
      "muon": optax.contrib.muon(RATE),
      "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE)),
    }.items()
  },
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@pytest.fixture(scope="module")
def problem():
  params, batch = problems.make(MODEL, (8, 5))
  return params, batch, *problems.grads_and_stats(MODEL, params, batch)


def stepper(tx, model=MODEL):
  """One training step, jitted."""

  @jax.jit
  def step(params, state, batch):
    (_, stats), grads = jax.value_and_grad(problems.loss_fn(model), has_aux=True)(params, batch)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  return step


def run(tx, params, batch, steps=3, model=MODEL):
  step, state = stepper(tx, model), tx.init(params)
  for _ in range(steps):
    params, state = step(params, state, batch)
  return params, state


def sgd_on_bnp():
  return optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(RATE))


# The contract of Optax's contributed optimizers.


@optimizers
def test_unexpected_extra_arguments_and_one_compilation(make, problem):
  params, _, grads, stats = problem
  tx, traces = make(), []

  @jax.jit
  def update(grads, state, params, stats, value):
    traces.append(1)
    return tx.update(grads, state, params, stats=stats, nobody_expects_this=1, value=value)

  state = jax.jit(tx.init)(params)
  for value in (1.0, 2.0):
    _, state = update(grads, state, params, stats, value)
  assert len(traces) == 1


@optimizers
def test_map_params(make, problem):
  params, *_ = problem
  state = jax.tree.map(lambda v: v + 1, make().init(params))
  chex.assert_trees_all_equal(optax.tree.map_params(make(), lambda v: v, state), state)
  tripled = optax.tree.map_params(make(), lambda v: 3 * v, state)
  for name in ("input_mean", "input_variance"):
    expected = jax.tree.map(lambda v: 3 * v, optax.tree.get(state, name))
    chex.assert_trees_all_equal(optax.tree.get(tripled, name), expected)


@optimizers
def test_inject_hyperparams(make, problem):
  params, _, grads, stats = problem
  hyperparameters = {"decay": 0.9, "eps_relative": 0.05, "eps_absolute": 1e-3}
  plain = make(**hyperparameters)

  # inject_hyperparams reads the signature, so it is given one.
  def factory(decay, eps_relative, eps_absolute):
    return make(decay=decay, eps_relative=eps_relative, eps_absolute=eps_absolute)

  injected = optax.inject_hyperparams(factory)(**hyperparameters)
  expected, expected_state = jax.jit(plain.update)(grads, plain.init(params), params, stats=stats)
  updates, state = jax.jit(injected.update)(
    grads, jax.jit(injected.init)(params), params, stats=stats
  )
  chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)
  chex.assert_trees_all_close(state.inner_state, expected_state, rtol=1e-5, atol=1e-6)


@optimizers
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_are_kept_and_the_state_is_stable(make, dtype):
  """Through lax.cond and lax.scan, which demand that nothing about the state changes."""
  with jax.enable_x64(dtype == "float64"):
    model = problems.MLP(dtype)
    params, batch = problems.make(model, (4, 3), dtype)
    grads, stats = problems.grads_and_stats(model, params, batch)
    tx = make()

    def steps(state):
      def body(state, _):
        updates, new_state = tx.update(grads, state, params, stats=stats)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        new_state = jax.lax.cond(new_state_is_wanted, lambda: new_state, lambda: state)
        return new_state, None

      new_state_is_wanted = jnp.asarray(True)
      return jax.lax.scan(body, state, length=2)[0]

    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(steps, state), state)


@optimizers
def test_abstract_init(make, problem):
  params, *_ = problem
  abstract = jax.eval_shape(make().init, params)
  again = jax.eval_shape(make().init, jax.eval_shape(lambda: params))
  concrete = make().init(params)
  for tree in (abstract, again):
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, concrete)


@optimizers
def test_sharded_parameters_keep_their_sharding(make):
  model = problems.MLP()
  params, batch = problems.make(model, (8, 8))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  params["first"]["kernel"] = jax.device_put(params["first"]["kernel"], sharding)
  tx = make()
  grads, stats = problems.grads_and_stats(model, params, batch)

  @jax.jit
  def step(params, state):
    updates, _ = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates)

  new = step(params, tx.init(params))["first"]["kernel"]
  assert new.sharding.is_equivalent_to(sharding, new.ndim)


# What a user wraps around it.


def test_chain_and_named_chain(problem):
  params, batch, *_ = problem
  expected, _ = run(sgd_on_bnp(), params, batch)
  named = optax.named_chain(("bnp", bnp_optax.scale_by_bnp()), ("sgd", optax.sgd(RATE)))
  actual, state = run(named, params, batch)
  chex.assert_trees_all_close(actual, expected, rtol=1e-6)
  assert state["bnp"].count == 3


@pytest.mark.parametrize("make", [sgd_on_bnp, OPTIMIZERS["adam"]], ids=["chain", "bnp"])
def test_layers_left_out_with_masked_or_partition_and_frozen(make, problem):
  """One layer is BNP's alone: it moves as it would in a model where the other is frozen."""
  params, batch, *_ = problem
  mask = {"first": True, "second": False}
  frozen = {"first": False, "second": True}
  label = {"first": "bnp", "second": "frozen"}
  wrapped = {
    "masked": optax.chain(optax.masked(make(), mask), optax.freeze(frozen)),
    "partition": optax.partition({"bnp": make(), "frozen": optax.set_to_zero()}, label),
    "freeze": optax.chain(make(), optax.freeze(frozen)),
    "selective_transform": optax.selective_transform(
      make(),
      freeze_mask=jax.tree.map(lambda _: False, params)
      | {"second": jax.tree.map(lambda _: True, params["second"])},
    ),
  }
  results = {name: run(tx, params, batch)[0] for name, tx in wrapped.items()}
  for name, result in results.items():
    chex.assert_trees_all_equal(result["second"], params["second"])
    chex.assert_trees_all_close(result["first"], results["masked"]["first"], rtol=1e-6), name
  assert not np.allclose(results["masked"]["first"]["kernel"], params["first"]["kernel"])


def test_two_bnp_optimizers_share_one_model(problem):
  """partition: each kernel belongs to one of them, and each takes its statistics from the same."""
  params, batch, *_ = problem
  both = optax.partition(
    {"a": sgd_on_bnp(), "b": bnp_optax.bnp(optax.sgd(RATE))}, {"first": "a", "second": "b"}
  )
  expected, _ = run(sgd_on_bnp(), params, batch)
  actual, _ = run(both, params, batch)
  chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_apply_if_finite_skips_the_step_and_the_statistics(problem):
  params, (x, y), *_ = problem
  tx = optax.apply_if_finite(OPTIMIZERS["adam"](), max_consecutive_errors=3)
  step, state = stepper(tx), tx.init(params)
  params, state = step(params, state, (x, y))
  kept, state_after = step(params, state, (x.at[0].set(jnp.nan), y))
  chex.assert_trees_all_equal(kept, params)
  chex.assert_trees_all_equal(state_after.inner_state, state.inner_state)
  assert state_after.total_notfinite == 1


def test_without_a_guard_nan_gradients_pass_but_the_statistics_survive(problem):
  """After max_consecutive_errors, apply_if_finite lets the step through; the state stays clean."""
  params, (x, y), *_ = problem
  tx = optax.apply_if_finite(OPTIMIZERS["sgd"](), max_consecutive_errors=0)
  _, state = run(tx, params, (x.at[0].set(jnp.nan), y), steps=1)
  statistics = state.inner_state.statistics
  chex.assert_tree_all_finite(statistics)
  assert statistics.nonfinite_count == 2


def test_lookahead_is_refused(problem):
  """It calls its optimizer without extra arguments: the statistics cannot get through."""
  params, _, grads, stats = problem
  tx = optax.with_extra_args_support(optax.lookahead(sgd_on_bnp(), 5, 0.5))
  fast_and_slow = optax.LookaheadParams.init_synced(params)
  with pytest.raises(ValueError, match="A wrapper that drops extra arguments drops them too"):
    tx.update(grads, tx.init(fast_and_slow), fast_and_slow, stats=stats)


def test_schedule_free_around_bnp(problem):
  """With frozen coordinates it is schedule-free SGD preconditioned; here: it runs and learns."""
  params, batch, *_ = problem
  tx = optax.contrib.schedule_free(bnp_optax.bnp(optax.sgd(RATE)), RATE)
  loss = lambda p: problems.loss_fn(MODEL)(p, batch)[0]
  trained, state = run(tx, params, batch, steps=50)
  assert loss(optax.contrib.schedule_free_eval_params(state, trained)) < 0.8 * loss(params)


def test_mechanize_around_bnp(problem):
  params, batch, *_ = problem
  loss = lambda p: problems.loss_fn(MODEL)(p, batch)[0]
  trained, _ = run(optax.contrib.mechanize(bnp_optax.bnp(optax.sgd(RATE))), params, batch, 100)
  assert loss(trained) < 0.5 * loss(params)


def test_clipping_before_and_after(problem):
  """Before: the raw gradient is clipped. After: the preconditioned one is."""
  params, _, grads, stats = problem
  clip, bnp = optax.clip_by_global_norm(0.1), bnp_optax.scale_by_bnp()
  update = lambda tx: jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)[0]
  after = update(optax.chain(bnp, clip))
  np.testing.assert_allclose(optax.tree.norm(after), 0.1, rtol=1e-6)
  before = update(optax.chain(clip, bnp))
  scale = 0.1 / optax.tree.norm(grads)
  chex.assert_trees_all_close(before, jax.tree.map(lambda u: scale * u, update(bnp)), rtol=1e-5)


def test_weight_decay_in_each_place(problem):
  """After BNP it decays theta, and in bnp(adamw) too; before BNP, it is preconditioned."""
  params, _, grads, stats = problem
  bnp, decay = bnp_optax.scale_by_bnp(), optax.add_decayed_weights(0.1)
  zero = jax.tree.map(jnp.zeros_like, grads)
  update = lambda tx, g=zero: jax.jit(tx.update)(g, tx.init(params), params, stats=stats)[0]
  decayed = jax.tree.map(lambda p: 0.1 * p, params)
  chex.assert_trees_all_equal(update(optax.chain(bnp, decay)), decayed)
  chex.assert_trees_all_close(update(bnp_optax.bnp(decay)), decayed, rtol=1e-5, atol=1e-7)
  preconditioned = update(optax.chain(decay, bnp))
  chex.assert_trees_all_close(preconditioned, update(bnp, decayed), rtol=1e-6)
  assert not np.allclose(preconditioned["first"]["kernel"], decayed["first"]["kernel"])


def test_ema_of_parameters(problem):
  params, batch, *_ = problem
  tx, ema = sgd_on_bnp(), optax.ema(0.9, debias=False)
  step, state, ema_state = stepper(tx), tx.init(params), ema.init(params)
  expected = jax.tree.map(jnp.zeros_like, params)
  for _ in range(3):
    params, state = step(params, state, batch)
    averaged, ema_state = ema.update(params, ema_state)
    expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, params)
  chex.assert_trees_all_close(averaged, expected, rtol=1e-5)


def test_tree_get_and_set_in_a_chain_with_adam(problem):
  params, batch, *_ = problem
  tx = optax.chain(bnp_optax.bnp(optax.adam(RATE)), optax.scale_by_adam())
  _, state = run(OPTIMIZERS["adam"](), params, batch)
  assert optax.tree.get(state, "input_mean")["first"]["kernel"].shape == (5,)
  assert optax.tree.get(state, "mu")["first"]["kernel"].shape == (5, 4)
  variance = jax.tree.map(jnp.zeros_like, optax.tree.get(state, "input_variance"))
  state = optax.tree.set(state, input_variance=variance)
  chex.assert_trees_all_equal(optax.tree.get(state, "input_variance"), variance)
  assert jax.eval_shape(tx.init, params)


def test_multisteps_hands_over_the_last_micro_batch_alone(problem):
  """This cannot be seen from inside: the statistics are those of one micro-batch."""
  params, (x, y), *_ = problem
  tx = optax.MultiSteps(sgd_on_bnp(), every_k_schedule=2)
  step, state = stepper(tx), tx.init(params)
  new = params
  for half in (slice(4), slice(4, 8)):
    new, state = step(new, state, (x[half], y[half]))
  _, last = run(sgd_on_bnp(), params, (x[4:], y[4:]), steps=1)
  mean = optax.tree.get(state, "input_mean")["first"]["kernel"]
  np.testing.assert_allclose(mean, optax.tree.get(last, "input_mean")["first"]["kernel"], rtol=1e-6)
  _, whole = run(sgd_on_bnp(), params, (x, y), steps=1)
  assert not np.allclose(mean, optax.tree.get(whole, "input_mean")["first"]["kernel"])


# Gradient accumulation.


def accumulated(model, tx, k):
  """One step on the mean gradient of k micro-batches, with Optax's own micro-batching."""
  mean, total = optax.microbatching.AccumulationType.MEAN, optax.microbatching.AccumulationType.SUM

  @jax.jit
  def step(params, state, batch):
    grad_fn = jax.value_and_grad(problems.loss_fn(model), has_aux=True)
    (_, stats), grads = optax.microbatching.microbatch(
      grad_fn, argnums=1, microbatch_size=len(batch[0]) // k, accumulator=((mean, total), mean)
    )(params, batch)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  return step


@pytest.mark.parametrize("make", [sgd_on_bnp, OPTIMIZERS["adam"]], ids=["chain", "bnp"])
@pytest.mark.parametrize(
  ("model", "k"),
  [(problems.MLP("float64"), 12), (problems.CNN("float64"), 4)],
  ids=["mlp, 12", "cnn, 4"],
)
def test_k_micro_batches_are_exactly_one_big_batch(make, model, k):
  with jax.enable_x64(True):
    shape = (12, 5) if isinstance(model, problems.MLP) else (12, 6, 6, 2)
    params, batch = problems.make(model, shape, "float64")
    whole, parts = stepper(make(), model), accumulated(model, make(), k)
    a = b = (params, make().init(params))
    for _ in range(3):
      a, b = whole(*a, batch), parts(*b, batch)
    chex.assert_trees_all_close(a, b, rtol=1e-11, atol=1e-13)
