"""The paper's step for any layer: its linear maps one by one, each through `tests.oracle`.

No import from the package. A layer is a list of entries, one for each linear map in it; an entry
says which part of the gradients is its kernel and bias, and what its inputs were.
"""

import dataclasses
import math

import numpy as np

from tests import oracle


@dataclasses.dataclass
class Entry:
  """One linear map: `h[N, *space, c]` are its inputs (see `oracle.algorithm_3`).

  `index` picks its part of the kernel and the bias; `order` then turns the kernel's axes into
  window, features, outputs, of which there are `window` and `features`; `outputs` picks from the
  outputs, flattened. `windows`, instead of one map for all entries of the window, holds the inputs
  of each, `[*window, N, *space, c]`.
  """

  path: tuple
  h: np.ndarray
  positions: int = 1
  examples: int | None = None
  index: tuple = ()
  order: tuple | None = None
  window: int = 0
  features: int = 1
  outputs: slice = dataclasses.field(default_factory=lambda: slice(None))
  kernel: str = "kernel"
  windows: np.ndarray | None = None


def get(tree, path):
  for name in path:
    tree = tree[name]
  return tree


def step(entries, grads, state, **hyperparameters):
  """Return the updates of the layers of all entries: `{path: (kernel, bias)}`.

  `state` is a dictionary, filled and updated: the running statistics by the number of the entry.
  """
  updates = {}
  for number, entry in enumerate(entries):
    where = get(grads, entry.path)
    kernel, bias = where[entry.kernel], where.get("bias")
    key = (*entry.path, entry.kernel)
    if key not in updates:
      updates[key] = (np.array(kernel), None if bias is None else np.array(bias))
    new_kernel, new_bias = updates[key]

    G = np.asarray(kernel)[entry.index]
    order = entry.order or tuple(range(G.ndim))
    G = G.transpose(order)
    window, last = G.shape[: entry.window], entry.window + entry.features
    shape = (*window, math.prod(G.shape[entry.window : last]), math.prod(G.shape[last:]))
    flat = G.reshape(shape)
    G_w = flat[..., entry.outputs]
    G_b = None if bias is None else np.asarray(bias)[entry.index].reshape(-1)[entry.outputs]
    if entry.windows is not None:
      # Equations (19) and (20): every entry of the window is a feature of its own.
      h = np.moveaxis(entry.windows.reshape(-1, *entry.windows.shape[len(window) :]), 0, -2)
      h = h.reshape(*h.shape[:-2], -1)
      G_w = G_w.reshape(-1, G_w.shape[-1])
    else:
      h = entry.h
    n = G_w.shape[-2]
    mu, sigma2 = state.get(number, (np.zeros(n), np.ones(n)))
    w, b, mu, sigma2 = oracle.algorithm_3(
      h, entry.positions, G_w, G_b, mu, sigma2, examples=entry.examples, **hyperparameters
    )
    state[number] = mu, sigma2

    flat = new_kernel[entry.index].transpose(order).reshape(shape).copy()
    flat[..., entry.outputs] = w.reshape(flat[..., entry.outputs].shape)
    new_kernel[entry.index] = flat.reshape(G.shape).transpose(np.argsort(order))
    if b is not None:
      flat = new_bias[entry.index].reshape(-1).copy()
      flat[entry.outputs] = b
      new_bias[entry.index] = flat.reshape(new_bias[entry.index].shape)
  return updates


def relative_error(updates, expected):
  """Return the largest |actual - expected| / |expected| of a layer, kernel and bias together."""
  worst = 0.0
  for (*path, kernel), (w, b) in expected.items():
    where = get(updates, path)
    actual, right = [np.ravel(where[kernel])], [np.ravel(w)]
    if b is not None:
      actual, right = [*actual, np.ravel(where["bias"])], [*right, np.ravel(b)]
    right = np.concatenate(right)
    # A kernel whose gradient is zero has an update of zero. Unlike max(), np.maximum keeps a NaN.
    error = np.linalg.norm(np.concatenate(actual) - right)
    worst = np.maximum(worst, error / np.linalg.norm(right) if error else 0.0)
  return worst


def dilate(h, dilation):
  """Put `dilation - 1` zeros between the positions of `h[N, *space, c]`, by loops."""
  space = [(s - 1) * d + 1 for s, d in zip(h.shape[1:-1], dilation, strict=True)]
  out = np.zeros((h.shape[0], *space, h.shape[-1]))
  for index in np.ndindex(*h.shape[1:-1]):
    at = tuple(i * d for i, d in zip(index, dilation, strict=True))
    out[(slice(None), *at)] = h[(slice(None), *index)]
  return out


def windows(h, kernel, strides, dilation, padding):
  """Return the inputs of each kernel entry, `[*window, N, *positions, c]`, by loops.

  `padding` is a pair for each axis, of zeros.
  """
  h = np.pad(h, [(0, 0), *padding, (0, 0)])
  reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
  positions = [
    (s - r) // stride + 1 for s, r, stride in zip(h.shape[1:-1], reach, strides, strict=True)
  ]
  out = np.zeros((*kernel, h.shape[0], *positions, h.shape[-1]))
  for k in np.ndindex(*kernel):
    for p in np.ndindex(*positions):
      at = tuple(i * s + j * d for i, s, j, d in zip(p, strides, k, dilation, strict=True))
      out[(*k, slice(None), *p)] = h[(slice(None), *at)]
  return out
