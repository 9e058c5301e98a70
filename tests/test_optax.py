"""BNP within Optax: the contract of Optax's own optimizers, and BNP inside each wrapper."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import bnp_optax
from tests import problems, reference

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")

RATE = 1e-2
MODEL = problems.MLP("float64")
# None is scale_by_bnp.
INNER = {
  "scale_by_bnp": None,
  "sgd": optax.sgd(RATE),
  "momentum": optax.sgd(RATE, momentum=0.9),
  "adam": optax.adam(RATE),
  "adamw": optax.adamw(RATE),
  "lion": optax.lion(RATE),
  "rmsprop": optax.rmsprop(RATE),
  "muon": optax.contrib.muon(RATE),
  "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE)),
}
optimizers = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)


def make(inner, decay=0.99, eps_relative=1e-2, eps_absolute=1e-4):
  """Return `scale_by_bnp` if `inner` is None, else `bnp(inner)`."""
  if inner is None:
    return bnp_optax.scale_by_bnp(decay, eps_relative, eps_absolute, debias=False)
  return bnp_optax.bnp(inner, decay, eps_relative, eps_absolute, debias=False)


@pytest.fixture(scope="module")
def problem(x64):
  params, batch = problems.make(MODEL, (8, 5), "float64")
  return params, batch, *problems.grads_and_stats(MODEL, params, batch)


def stepper(tx, model=MODEL):
  """Return one training step, jitted."""

  @jax.jit
  def step(params, state, batch):
    (_, stats), grads = jax.value_and_grad(problems.loss_fn(model), has_aux=True)(params, batch)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state

  return step


def run(tx, params, batches, model=MODEL):
  """Take one step on each batch; return the parameters and the state."""
  step, state = stepper(tx, model), jax.jit(tx.init)(params)
  for batch in batches:
    params, state = step(params, state, batch)
  return params, state


def sgd_on_bnp():
  return optax.chain(bnp_optax.scale_by_bnp(debias=False), optax.sgd(RATE))


def sgd_on_reference():
  return optax.chain(reference.bnp(), optax.sgd(RATE))


def close(actual, expected):
  chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-12)


# The contract of Optax's contributed optimizers.


@optimizers
def test_unexpected_extra_arguments_and_one_compilation(inner, problem):
  params, _, grads, stats = problem
  tx, traces = make(inner), []

  @jax.jit
  def update(grads, state, params, stats, value):
    traces.append(1)
    return tx.update(grads, state, params, stats=stats, nobody_expects_this=1, value=value)

  state = jax.jit(tx.init)(params)
  for value in (1.0, 2.0):
    _, state = update(grads, state, params, stats, value)
  assert len(traces) == 1


@optimizers
def test_map_params(inner, problem):
  """The arrays of BNP's state are vectors; those of the inner optimizer are like the parameters."""
  params, *_ = problem
  state = jax.tree.map(lambda v: v + 1, make(inner).init(params))
  tripled = optax.tree.map_params(make(inner), lambda v: 3 * v, state)
  chex.assert_trees_all_equal(optax.tree.map_params(make(inner), lambda v: v, state), state)
  for name in ("input_mean", "input_variance", "input_weight"):
    chex.assert_trees_all_equal(optax.tree.get(tripled, name), optax.tree.get(state, name))
  if inner is INNER["adam"]:
    mu = optax.tree.get(state, "mu")
    chex.assert_trees_all_equal(optax.tree.get(tripled, "mu"), jax.tree.map(lambda v: 3 * v, mu))


@pytest.mark.parametrize("inner", [None, INNER["adam"]])
def test_map_params_with_specs(inner, problem):
  """The statistics are replicated; what is like the parameters is split as they are."""
  params, *_ = problem
  kernel, bias = P(None, "model"), P("model")
  specs = jax.tree.map(lambda v: kernel if v.ndim == 2 else bias, params)
  tx = make(inner)
  arguments = lambda _, spec: spec, jax.eval_shape(tx.init, params), specs
  found = optax.tree.map_params(tx, *arguments, transform_non_params=lambda _: P())
  mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
  is_spec = lambda v: isinstance(v, P)
  shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), found, is_leaf=is_spec)
  state = jax.jit(tx.init, out_shardings=shardings)(params)
  for name in ("input_mean", "input_variance"):
    assert {v.sharding.spec for v in jax.tree.leaves(optax.tree.get(state, name))} == {P()}
  if inner:
    moments = optax.tree.get(state, "mu")
    assert jax.tree.map(lambda v: v.sharding.spec, moments) == specs


@optimizers
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_are_kept_and_the_state_is_stable(inner, dtype):
  """Through lax.cond and lax.scan, which demand that nothing about the state changes."""
  with jax.enable_x64(dtype == "float64"):
    model = problems.MLP(dtype)
    params, batch = problems.make(model, (4, 3), dtype)
    grads, stats = problems.grads_and_stats(model, params, batch)
    tx = make(inner)

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
def test_abstract_init(inner, problem):
  params, *_ = problem
  abstract = jax.eval_shape(make(inner).init, params)
  again = jax.eval_shape(make(inner).init, jax.eval_shape(lambda: params))
  concrete = make(inner).init(params)
  for tree in (abstract, again):
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, concrete)


@optimizers
def test_sharded_parameters_keep_their_sharding(inner):
  model = problems.MLP()
  params, batch = problems.make(model, (8, 8))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  params["first"]["kernel"] = jax.device_put(params["first"]["kernel"], sharding)
  tx = make(inner)
  grads, stats = problems.grads_and_stats(model, params, batch)

  @jax.jit
  def step(params, state):
    updates, _ = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates)

  new = step(params, tx.init(params))["first"]["kernel"]
  assert new.sharding.is_equivalent_to(sharding, new.ndim)


# BNP inside the wrappers of Optax. Every expectation is that of `tests.reference`, in NumPy.


@pytest.mark.slow
@optimizers
def test_inject_hyperparams(inner, problem):
  params, batch, *_ = problem
  tx = optax.inject_hyperparams(functools.partial(make, inner))(
    decay=lambda count: 0.9 / (1 + count), eps_relative=0.05, eps_absolute=1e-3
  )
  actual, state = run(tx, params, [batch])
  expected, _ = reference.train(
    reference.bnp(inner, rho=0.9, eps_1=0.05, eps_2=1e-3), MODEL, params, [batch]
  )
  close(actual, expected)
  assert state.hyperparams["decay"] == 0.9


def test_chain_and_named_chain(problem):
  params, batch, *_ = problem
  expected, _ = reference.train(sgd_on_reference(), MODEL, params, [batch] * 3)
  actual, _ = run(sgd_on_bnp(), params, [batch] * 3)
  close(actual, expected)
  named = optax.named_chain(("bnp", bnp_optax.scale_by_bnp(debias=False)), ("sgd", optax.sgd(RATE)))
  actual, state = run(named, params, [batch] * 3)
  close(actual, expected)
  assert state["bnp"].count == 3


@pytest.mark.parametrize("kind", ["masked", "partition", "freeze", "selective_transform"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_layers_left_out_with_masked_or_partition_and_frozen(kind, name, problem):
  """The layer that is not frozen takes the steps that it takes in the whole model."""
  params, batch, *_ = problem
  inner = INNER[name]
  mask, frozen = {"first": True, "second": False}, {"first": False, "second": True}
  leaves = {layer: jax.tree.map(lambda _, f=f: f, params[layer]) for layer, f in frozen.items()}
  label = {"first": "bnp", "second": "frozen"}
  tx = {
    "masked": lambda: optax.chain(optax.masked(make(inner), mask), optax.freeze(frozen)),
    "partition": lambda: optax.partition(
      {"bnp": make(inner), "frozen": optax.set_to_zero()}, label
    ),
    "freeze": lambda: optax.chain(make(inner), optax.freeze(frozen)),
    "selective_transform": lambda: optax.selective_transform(make(inner), freeze_mask=leaves),
  }[kind]()
  actual, _ = run(tx, params, [batch] * 3)
  expected, _ = reference.train(
    optax.chain(reference.bnp(inner), optax.freeze(frozen)), MODEL, params, [batch] * 3
  )
  close(actual, expected)
  chex.assert_trees_all_equal(actual["second"], params["second"])


def test_two_bnp_optimizers_share_one_model(problem):
  """Under partition, each kernel belongs to one of them; both take the same statistics."""
  params, batch, *_ = problem
  both = optax.partition(
    {"a": sgd_on_bnp(), "b": bnp_optax.bnp(optax.sgd(RATE), debias=False)},
    {"first": "a", "second": "b"},
  )
  actual, _ = run(both, params, [batch] * 3)
  expected, _ = reference.train(sgd_on_reference(), MODEL, params, [batch] * 3)
  close(actual, expected)


def test_apply_if_finite_skips_the_step_and_the_statistics(problem):
  params, (x, y), *_ = problem
  tx = optax.apply_if_finite(make(INNER["adam"]), max_consecutive_errors=3)
  step, state = stepper(tx), tx.init(params)
  once, state = step(params, state, (x, y))
  kept, state_after = step(once, state, (x.at[0].set(jnp.nan), y))
  chex.assert_trees_all_equal(kept, once)
  chex.assert_trees_all_equal(state_after.inner_state, state.inner_state)
  assert state_after.total_notfinite == 1
  twice, _ = step(kept, state_after, (x, y))
  expected, _ = reference.train(reference.bnp(INNER["adam"]), MODEL, params, [(x, y)] * 2)
  close(twice, expected)


def test_without_a_guard_nan_gradients_pass_but_the_statistics_survive(problem):
  """After max_consecutive_errors, apply_if_finite passes the step on; the state stays finite."""
  params, (x, y), *_ = problem
  tx = optax.apply_if_finite(make(INNER["sgd"]), max_consecutive_errors=0)
  step = stepper(tx)
  broken, state = step(params, tx.init(params), (x.at[0].set(jnp.nan), y))
  assert np.isnan(broken["first"]["kernel"]).any()
  statistics = state.inner_state.statistics
  chex.assert_tree_all_finite(statistics)
  assert statistics.nonfinite_count == 2
  actual, _ = step(params, state, (x, y))
  expected, _ = reference.train(sgd_on_reference(), MODEL, params, [(x, y)])
  close(actual, expected)


def test_lookahead_is_refused(problem):
  """It calls its optimizer without extra arguments, but inside a step they can be bound."""
  params, batch, grads, stats = problem
  tx = optax.with_extra_args_support(optax.lookahead(sgd_on_bnp(), 5, 0.5))
  both = optax.LookaheadParams.init_synced(params)
  with pytest.raises(ValueError, match="Wrappers that drop extra arguments also drop stats"):
    tx.update(grads, tx.init(both), both, stats=stats)
  inner = sgd_on_bnp()
  bound = optax.GradientTransformation(inner.init, functools.partial(inner.update, stats=stats))
  tx = optax.lookahead(bound, 5, 0.5)
  updates, _ = jax.jit(tx.update)(grads, tx.init(both), both)
  expected, _ = reference.train(sgd_on_reference(), MODEL, params, [batch])
  close(optax.apply_updates(params, updates.fast), expected)


WRAPPERS = {
  "schedule_free": lambda inner: optax.contrib.schedule_free(inner, RATE),
  "mechanize": optax.contrib.mechanize,
  "ema": lambda inner: optax.chain(inner, optax.ema(0.9)),
  "apply_every": lambda inner: optax.chain(inner, optax.apply_every(2)),
  "clip": lambda inner: optax.chain(inner, optax.clip_by_global_norm(1e-3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_takes_the_steps_that_it_takes_around_the_reference(name, problem):
  params, batch, *_ = problem
  tx = WRAPPERS[name](bnp_optax.bnp(optax.sgd(RATE), debias=False))
  actual, state = run(tx, params, [batch] * 3)
  expected, expected_state = reference.train(
    WRAPPERS[name](reference.bnp(optax.sgd(RATE))), MODEL, params, [batch] * 3
  )
  close(actual, expected)
  if name == "schedule_free":
    evaluate = optax.contrib.schedule_free_eval_params
    close(evaluate(state, actual), evaluate(expected_state, expected))


def test_conditionally_mask(problem):
  """All updates but the second are masked out."""
  params, batch, *_ = problem
  tx = optax.conditionally_mask(
    bnp_optax.bnp(optax.sgd(RATE), debias=False), lambda step, **extra_args: step == 1
  )
  actual, _ = run(tx, params, [batch] * 3)
  expected, _ = reference.train(sgd_on_reference(), MODEL, params, [batch])
  close(actual, expected)


def test_flatten_inside_bnp(problem):
  """Adam takes the same steps on one vector of all coordinates z."""
  params, batch, *_ = problem
  actual, _ = run(bnp_optax.bnp(optax.flatten(INNER["adam"]), debias=False), params, [batch] * 3)
  expected, _ = reference.train(reference.bnp(INNER["adam"]), MODEL, params, [batch] * 3)
  close(actual, expected)


def test_flatten_around_bnp_is_refused(problem):
  """The parameters are one vector without a kernel, so that nothing would be preconditioned."""
  params, *_ = problem
  tx = optax.flatten(bnp_optax.scale_by_bnp(debias=False))
  with pytest.raises(ValueError, match="BNP covers no layer"):
    tx.init(params)


def precondition(tree, problem):
  """Return P P^T of the first batch, times a tree."""
  params, batch, *_ = problem
  _, calls = reference.gradients(MODEL, params, batch)
  tx = reference.bnp()
  return tx.update(jax.tree.map(np.asarray, tree), tx.init(params), calls=calls)[0]


def first_update(tx, problem):
  params, _, grads, stats = problem
  return jax.jit(tx.update)(grads, tx.init(params), params, stats=stats)[0]


def test_clipping_before_and_after(problem):
  """Before: the raw gradient is clipped. After: the preconditioned one is."""
  grads = problem[2]
  clip, bnp = optax.clip_by_global_norm(0.1), bnp_optax.scale_by_bnp(debias=False)
  clipped = lambda tree: jax.tree.map(lambda x: x * 0.1 / optax.tree.norm(tree), tree)
  close(first_update(optax.chain(bnp, clip), problem), clipped(precondition(grads, problem)))
  close(first_update(optax.chain(clip, bnp), problem), precondition(clipped(grads), problem))


def test_weight_decay_in_each_place(problem):
  """After BNP it decays theta, and in bnp(adamw) too; before BNP, it is preconditioned."""
  params, _, grads, _ = problem
  bnp, decay = bnp_optax.scale_by_bnp(debias=False), optax.add_decayed_weights(0.1)
  plus_decay = lambda tree: jax.tree.map(lambda u, p: u + 0.1 * p, tree, params)
  decoupled = plus_decay(precondition(grads, problem))
  close(first_update(optax.chain(bnp, decay), problem), decoupled)
  close(first_update(bnp_optax.bnp(decay, debias=False), problem), decoupled)
  coupled = precondition(plus_decay(grads), problem)
  close(first_update(optax.chain(decay, bnp), problem), coupled)


def test_tree_get_and_set(problem):
  """By field names, which are not those of Adam."""
  params, batch, *_ = problem
  tx = bnp_optax.bnp(optax.adam(RATE), debias=False)
  trained, state = run(tx, params, [batch] * 3)
  expected, (running, inner_state) = reference.train(
    reference.bnp(optax.adam(RATE)), MODEL, params, [batch] * 3
  )
  for name, (mean, variance) in running.items():
    close(optax.tree.get(state, "input_mean")[name]["kernel"], mean)
    close(optax.tree.get(state, "input_variance")[name]["kernel"], variance)
  close(optax.tree.get(state, "mu"), optax.tree.get(inner_state, "mu"))

  new = jax.tree.map(lambda v: 4 * v, optax.tree.get(state, "input_variance"))
  actual, _ = stepper(tx)(trained, optax.tree.set(state, input_variance=new), batch)
  running = {name: (mean, 4 * variance) for name, (mean, variance) in running.items()}
  grads, calls = reference.gradients(MODEL, expected, batch)
  updates, _ = reference.bnp(optax.adam(RATE)).update(
    grads, (running, inner_state), expected, calls=calls
  )
  close(actual, optax.apply_updates(expected, updates))


def test_multisteps_hands_over_the_last_micro_batch_alone(problem):
  """BNP cannot detect it: the gradient is the mean, the statistics those of one micro-batch."""
  params, (x, y), *_ = problem
  halves = [(x[half], y[half]) for half in (slice(4), slice(4, 8))]
  tx = problems.multi_steps(sgd_on_bnp(), 2)
  actual, state = run(tx, params, halves)
  (first, _), (second, calls) = (reference.gradients(MODEL, params, half) for half in halves)
  mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
  tx = sgd_on_reference()
  updates, _ = tx.update(mean, tx.init(params), params, calls=calls)
  close(actual, optax.apply_updates(params, updates))
  last = optax.tree.get(state, "input_mean")["first"]["kernel"]
  close(last, 0.01 * np.mean(halves[1][0], axis=0))


# Gradient accumulation.


def accumulated(model, tx, k):
  """Return one step on the mean gradient of k micro-batches, by Optax's own micro-batching."""
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scale_by_bnp", "adam"])
@pytest.mark.parametrize(
  ("model", "shape", "k"),
  [(MODEL, (12, 5), 12), (problems.CNN("float64"), (12, 6, 6, 2), 4)],
  ids=["mlp, 12", "cnn, 4"],
)
def test_k_micro_batches_are_exactly_one_big_batch(name, model, shape, k):
  params, batch = problems.make(model, shape, "float64")
  tx = optax.chain(make(INNER[name]), optax.scale(0.1))
  step, carry = accumulated(model, tx, k), (params, tx.init(params))
  for _ in range(3):
    carry = step(*carry, batch)
  whole = run(tx, params, [batch] * 3, model)
  chex.assert_trees_all_close(carry, whole, rtol=1e-11, atol=1e-13)
  expected, _ = reference.train(
    optax.chain(reference.bnp(INNER[name]), optax.scale(0.1)), model, params, [batch] * 3
  )
  close(carry[0], expected)


@pytest.mark.slow
def test_multi_steps_inside_bnp():
  """N is that of a micro-batch unless it is passed: the loss is a mean over 4 of them."""
  model, (x, _) = problems.MLP("float64"), (np.random.default_rng(0).normal(size=(32, 300)), None)
  params = jax.jit(model.init)(jax.random.key(0), x)["params"]

  @functools.partial(jax.jit, static_argnums=1)
  def gradient(x, examples):
    def loss(params):
      with bnp_optax.linen.sow_statistics(examples=examples):
        y, aux = model.apply({"params": params}, x, mutable=["intermediates"])
      return jnp.mean(y**2), aux["intermediates"]

    return jax.grad(loss, has_aux=True)(params)

  def step(inner, parts, examples):
    tx = problems.compiled(bnp_optax.bnp(inner))
    state = tx.init(params)
    for part in parts:
      grads, stats = gradient(part, examples)
      updates, state = tx.update(grads, state, params, stats=stats)
    return float(optax.tree.norm(updates["first"]))

  whole = step(optax.sgd(1.0), [x], None)
  multi = problems.multi_steps(optax.sgd(1.0), 4)
  parts = np.split(x, 4)
  assert 0.2 < step(multi, parts, None) / whole < 0.3
  assert 0.9 < step(multi, parts, 32) / whole < 1.1
