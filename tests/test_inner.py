"""The inner optimizers that `bnp` refuses: those that leave out a kernel or a bias alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from tests import problems
from tests.problems import raises

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARTS = {
  "first": {"kernel": "kernel", "bias": "bias"},
  "second": {"kernel": "kernel", "bias": "bias"},
}


def kernels(params):
  return jax.tree.map(lambda v: v.ndim > 1, params)


def biases(params):
  return jax.tree.map(lambda v: v.ndim == 1, params)


def decayed_kernels(rate=0.1):
  return optax.adamw(rate, mask=kernels)


def frozen(params):
  return {"first": kernels(params["first"]), "second": {"kernel": False, "bias": False}}


def then_decay(function, mask=kernels):
  return optax.chain(
    optax.stateless(lambda updates, _: jax.tree.map(function, updates)),
    optax.add_decayed_weights(0.1, mask=mask),
  )


@jax.jit
def clip(limit, updates):
  """Clip a tree. It has the name of `jnp.clip`, but other arguments and results."""
  return jax.tree.map(lambda g: jnp.clip(g, -limit, limit), updates)


def scale_by_value():
  def update(updates, state, params=None, *, value, **_):
    return jax.tree.map(lambda g: value * g, updates), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


@pytest.mark.parametrize(
  ("inner", "match"),
  [
    (
      optax.adamw(0.1, mask=kernels),
      "first: .* changes the kernel through its values but not the bias",
    ),
    (
      optax.lion(0.1, weight_decay=0.1, mask=biases),
      "the bias through its values but not the kernel",
    ),
    (then_decay(lambda g: g.T.T, biases), "the bias through its values but not the kernel"),
    (optax.contrib.muon(0.1, weight_decay=0.1), "the kernel through its values but not the bias"),
    (
      optax.chain(optax.sgd(0.1), optax.freeze(biases)),
      "the kernel through its gradient but not the bias",
    ),
    (optax.chain(optax.sgd(0.1), optax.freeze(frozen)), "first: .* the bias through its gradient"),
    (
      optax.partition({"kernel": optax.adam(0.1), "bias": optax.set_to_zero()}, PARTS),
      "the kernel through its gradient but not the bias",
    ),
    (
      optax.inject_hyperparams(optax.adamw, static_args="mask")(0.1, mask=kernels),
      "the kernel through its values but not the bias",
    ),
    # Steps that depend on all values and gradients of a leaf, or are chosen by a condition.
    (
      optax.chain(decayed_kernels(), optax.adaptive_grad_clip(0.03)),
      "the kernel through its values",
    ),
    (optax.chain(optax.clip(1.0), decayed_kernels()), "the kernel through its values"),
    (optax.lamb(0.1, weight_decay=0.1, mask=kernels), "the kernel through its values"),
    (
      optax.adafactor(0.1, weight_decay_rate=0.1, weight_decay_mask=kernels),
      "the kernel through its values",
    ),
    (
      decayed_kernels(optax.warmup_cosine_decay_schedule(0, 0.1, 5, 9)),
      "the kernel through its values",
    ),
    (
      optax.chain(decayed_kernels(), optax.contrib.reduce_on_plateau()),
      "the kernel through its values",
    ),
    (
      optax.MultiSteps(decayed_kernels(), 2).gradient_transformation(),
      "the kernel through its values",
    ),
    (
      optax.apply_if_finite(optax.chain(optax.sgd(0.1), optax.freeze(biases)), 3),
      "the kernel through its gradient",
    ),
    (
      optax.MultiSteps(
        optax.chain(optax.sgd(0.1), optax.freeze(biases)), 2
      ).gradient_transformation(),
      "the kernel through its gradient",
    ),
  ],
)
def test_a_kernel_and_its_bias_apart(inner, match, mlp):
  raises(rf"bnp: layer .*{match}.*optax.chain\(bnp_optax.bnp\(", bnp_optax.bnp(inner).init, mlp[0])


@pytest.mark.parametrize(
  "inner",
  [
    *map(then_decay, (jnp.abs, jnp.copy, jnp.negative, jnp.sqrt, jnp.square, jnp.tanh)),
    then_decay(lambda g: g / jnp.linalg.norm(g)),
    then_decay(lambda g: g + jnp.vdot(g, g)),
    then_decay(lambda g: g + jnp.sum(g)),
    then_decay(lambda g: g[None].squeeze(0)),
    then_decay(lambda g: g.reshape(-1).reshape(g.shape)),
    # The casts of a moment, and concatenate and split.
    optax.chain(optax.adam(0.1, mu_dtype="bfloat16"), optax.add_decayed_weights(0.1, mask=kernels)),
    optax.chain(optax.flatten(optax.sgd(0.1)), optax.add_decayed_weights(0.1, mask=kernels)),
  ],
)
def test_a_decay_of_kernels_after_steps_that_are_zero_without_a_gradient(inner, mlp):
  raises(
    "first: .* changes the kernel through its values but not the bias",
    bnp_optax.bnp(inner).init,
    mlp[0],
  )


@pytest.mark.parametrize(
  "inner",
  [
    optax.adamw(0.1),
    # Not zero without a gradient.
    then_decay(lambda g: g**-1),
    then_decay(lambda g: g**0),
    optax.adamw(0.1, weight_decay=0.0, mask=kernels),
    optax.contrib.muon(0.1),
    optax.lamb(0.1),
    optax.adafactor(0.1),
    optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    optax.chain(optax.sgd(0.1), optax.adaptive_grad_clip(0.03)),
    optax.partition({"kernel": optax.adam(0.1), "bias": optax.sgd(0.1)}, PARTS),
    optax.partition(
      {"train": optax.adam(0.1), "freeze": optax.set_to_zero()},
      {"first": "freeze", "second": "train"},
    ),
    optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    optax.adamw(optax.warmup_cosine_decay_schedule(0, 0.1, 5, 9)),
    optax.contrib.muon(optax.cosine_decay_schedule(0.1, 9)),
    optax.chain(optax.clip(1.0), optax.rmsprop(0.1, momentum=0.9)),
    optax.apply_if_finite(optax.adamw(0.1), 3),
    optax.MultiSteps(optax.lion(0.1), 2).gradient_transformation(),
    optax.partition({"kernel": optax.contrib.muon(0.1), "bias": optax.lion(0.1)}, PARTS),
    optax.chain(optax.masked(optax.adaptive_grad_clip(0.03), kernels), optax.sgd(0.1)),
    optax.noisy_sgd(0.1, key=0),
    optax.chain(optax.stateless(lambda g, _: clip(1.0, g)), optax.sgd(0.1)),
    optax.chain(optax.masked(scale_by_value(), kernels), optax.sgd(0.1)),
  ],
)
def test_both_alike(inner, mlp):
  jax.eval_shape(bnp_optax.bnp(inner).init, mlp[0])


def test_parameters_of_no_layer_may_be_masked(mlp):
  params = {**mlp[0], "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
  mask = {"first": True, "second": True, "norm": {"scale": True, "bias": False}}
  tx = bnp_optax.bnp(optax.adamw(0.1, mask=mask), layers=_layers())
  jax.eval_shape(tx.init, params)


def _layers():
  return bnp_optax.linen.layers(problems.MLP(), jnp.ones((8, 5)))


def test_the_decay_of_kernels_outside_leaves_the_biases_where_they_are(mlp):
  """With a gradient of 0 the step is the decay alone; inside, the biases would decay as well."""
  params, grads, stats = mlp
  grads = jax.tree.map(jnp.zeros_like, grads)
  decay = optax.add_decayed_weights(0.1, mask=kernels)
  adam = bnp_optax.bnp(optax.scale_by_adam())
  tx = problems.compiled(optax.chain(adam, decay, optax.scale(-0.5)))
  updates, _ = tx.update(grads, tx.init(params), params, stats=stats)
  for name, layer in updates.items():
    kernel = np.asarray(params[name]["kernel"], np.float64)
    np.testing.assert_allclose(layer["kernel"], -0.05 * kernel, rtol=1e-6)
    np.testing.assert_array_equal(layer["bias"], 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["value_fn", "grad", "grad_fn", "obj_fn"])
def test_functions_of_the_parameters_do_not_reach_the_inner_optimizer(name, mlp):
  params, grads, stats = mlp

  def update(updates, state, params=None, **extra_args):
    assert extra_args == {"value": 1.0}
    return updates, state

  inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
  tx = bnp_optax.bnp(inner)
  tx.update(grads, tx.init(params), params, stats=stats, value=1.0, **{name: None})


@pytest.mark.parametrize("name", ["value_fn", "grad", "grad_fn", "obj_fn"])
def test_an_inner_optimizer_that_needs_functions_of_the_parameters(name, mlp):
  params, grads, stats = mlp

  def update(updates, state, params=None, **extra_args):
    if name not in extra_args:
      raise ValueError(f"{name} must be provided.")
    return updates, state

  tx = bnp_optax.bnp(optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update))
  arguments = {"stats": stats, name: None}
  state = tx.init(params)
  raises(f"inner optimizer failed without .*{name}=", tx.update, grads, state, params, **arguments)
  # Without them, the error is that of the inner optimizer.
  raises(f"^{name} must be provided", tx.update, grads, state, params, stats=stats)


def test_sam_is_refused_on_both_sides(mlp):
  """It drops the statistics around BNP. Inside, it keeps a copy, or takes a gradient at z."""
  params, grads, stats = mlp
  ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
  around = optax.contrib.sam(bnp_optax.bnp(optax.sgd(0.1)), ascent)
  with pytest.raises(TypeError, match="stats"):
    around.update(grads, around.init(params), params, stats=stats)
  raises(
    "copy of the parameters", bnp_optax.bnp(optax.contrib.sam(optax.sgd(0.1), ascent)).init, params
  )
  opaque = bnp_optax.bnp(optax.contrib.sam(optax.sgd(0.1), ascent, opaque_mode=True))
  state, arguments = opaque.init(params), {"stats": stats, "grad_fn": lambda p, _: p}
  raises("failed without .*grad_fn=", opaque.update, grads, state, params, **arguments)
