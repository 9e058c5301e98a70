"""Small networks and their gradients, shared by the tests of the transformations."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax


class MLP(nn.Module):
  """Two dense layers, named so that error messages can be checked."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    make = lambda size, name: nn.Dense(size, dtype=self.dtype, param_dtype=self.dtype, name=name)
    return make(3, "second")(nn.tanh(make(4, "first")(x)))


class CNN(nn.Module):
  """A strided convolution, one without bias, and a dense head."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    kwargs = {"dtype": self.dtype, "param_dtype": self.dtype}
    x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="first", **kwargs)(x))
    x = nn.relu(nn.Conv(4, (3, 3), use_bias=False, name="second", **kwargs)(x))
    return nn.Dense(3, name="head", **kwargs)(x.reshape(x.shape[0], -1))


def loss_fn(model):
  """Return the function that computes the loss on a batch `(x, y)` and the statistics."""

  def loss(params, batch):
    x, y = batch
    with bnp_optax.linen.sow_statistics():
      outputs, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    return jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1)), aux["intermediates"]

  return loss


def make(model, shape, dtype=jnp.float32, seed=0):
  """Return parameters, and a batch whose inputs have a mean and uneven deviations."""
  rng = np.random.default_rng(seed)
  # A transfer to the device; jnp.asarray compiles a program for each shape.
  array = lambda x: jax.device_put(x.astype(jnp.dtype(dtype)))
  x = array(rng.normal(1, np.linspace(0.1, 2, shape[-1]), shape))
  params = _init(model)(jax.random.key(seed), x)["params"]
  outputs = jax.eval_shape(lambda x: model.apply({"params": params}, x), x)
  return params, (x, array(rng.normal(size=outputs.shape)))


def grads_and_stats(model, params, batch):
  (_, stats), grads = _grad(model)(params, batch)
  return grads, stats


# A new function object is compiled again.


@functools.cache
def _init(model):
  return jax.jit(model.init)


@functools.cache
def _grad(model):
  return jax.jit(jax.value_and_grad(loss_fn(model), has_aux=True))


def compiled(tx):
  """Return the transformation with a compiled `init` and `update`: one program each."""
  return optax.GradientTransformationExtraArgs(jax.jit(tx.init), jax.jit(tx.update))


def raises(match, fn, *args, **kwargs):
  """Check that a ValueError is raised while tracing, before anything is computed."""
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(lambda: fn(*args, **kwargs))


def multi_steps(tx, count):
  """Return `optax.MultiSteps` that accumulates in float64, as it always does before Optax 0.2.8."""
  dtype = {"accumulator_dtype": jnp.float64}
  known = "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters
  return optax.MultiSteps(tx, every_k_schedule=count, **(dtype if known else {}))
