"""BNP as an optimizer in NumPy float64, for Dense and Conv, on `tests.oracle`.

No import from the package. Each layer's P is an explicit matrix, so that an inner optimizer runs on
z by two products. A wrapper of Optax gives the same steps around this optimizer as around BNP.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests import oracle


@functools.cache
def _recorder(model):
  @jax.jit
  def forward(params, x):
    calls = {}

    def interceptor(next_fun, args, kwargs, context):
      outputs = next_fun(*args, **kwargs)
      if isinstance(context.module, nn.Dense | nn.Conv) and context.method_name == "__call__":
        calls[context.module.name] = args[0], outputs
      return outputs

    with nn.intercept_methods(interceptor):
      model.apply({"params": params}, x)
    return calls

  return forward


def squared_error(outputs, y):
  """Return the loss of `tests.problems`."""
  return jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1))


@functools.cache
def _gradient(model, loss):
  return jax.jit(jax.grad(lambda params, x, y: loss(model.apply({"params": params}, x), y)))


def gradients(model, params, batch, loss=squared_error):
  """Return the gradients of the loss, and the calls of the layers, `{layer: (h, outputs)}`."""
  to_numpy = functools.partial(jax.tree.map, np.asarray)
  grads, calls = _gradient(model, loss)(params, *batch), _recorder(model)(params, batch[0])
  return to_numpy(grads), to_numpy(calls)


def bnp(inner=None, *, scale_layers=True, **hyperparameters):
  """Return the optimizer P inner(P^T g, P^-1 theta), whose `update` takes `calls`.

  Args:
    inner: The inner optimizer; None for plain gradients, P P^T g.
    scale_layers: False for q = 1.
    **hyperparameters: `rho`, `eps_1` and `eps_2` of `tests.oracle`.
  """
  inner = optax.with_extra_args_support(optax.identity() if inner is None else inner)

  def init(params):
    return {}, inner.init(params)

  def update(grads, state, params=None, *, calls, **extra_args):
    running, inner_state = state
    running, matrices = dict(running), {}
    for name, layer in grads.items():
      running[name], matrices[name] = _advance(layer, *calls[name], running.get(name))
    apply = lambda tree, matrix: {
      name: _from_columns(matrix(matrices[name]) @ _columns(layer), layer)
      for name, layer in tree.items()
    }
    z = None if params is None else apply(params, np.linalg.inv)
    updates, inner_state = inner.update(apply(grads, np.transpose), inner_state, z, **extra_args)
    return apply(updates, np.asarray), (running, inner_state)

  def _advance(layer, h, outputs, statistics):
    features = layer["kernel"].shape[-2]
    window, positions = math.prod(layer["kernel"].shape[:-2]), math.prod(outputs.shape[1:-1])
    mu, sigma2 = (np.zeros(features), np.ones(features)) if statistics is None else statistics
    _, _, mu, sigma2 = oracle.algorithm_3(
      h, positions, layer["kernel"], layer.get("bias"), mu, sigma2, **hyperparameters
    )
    q2 = max(window * features / len(h), math.sqrt(positions)) if scale_layers else 1.0
    epsilons = {k: v for k, v in hyperparameters.items() if k != "rho"}
    P = oracle.explicit_matrices(mu, sigma2, window, q2, **epsilons)
    return (mu, sigma2), P if "bias" in layer else P[1:, 1:]

  return optax.GradientTransformationExtraArgs(init, update)


def train(tx, model, params, batches, loss=squared_error):
  """Take one step on each batch; return the parameters and the state."""
  params = jax.tree.map(np.asarray, params)
  state = tx.init(params)
  for batch in batches:
    grads, calls = gradients(model, params, batch, loss)
    updates, state = tx.update(grads, state, params, calls=calls)
    params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
  return params, state


def _columns(layer):
  """Return [b, w], one column for each output."""
  w = np.reshape(layer["kernel"], (-1, np.shape(layer["kernel"])[-1]))
  return np.vstack([layer["bias"][None], w]) if "bias" in layer else w


def _from_columns(columns, layer):
  """Return the kernel and bias, of the shapes in `layer`, from [b, w]."""
  w = columns[1:] if "bias" in layer else columns
  out = {"kernel": w.reshape(np.shape(layer["kernel"]))}
  return out | {"bias": columns[0]} if "bias" in layer else out
