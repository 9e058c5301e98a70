"""Accuracy and loss of the lanes of a stack on other images."""

import functools
from typing import NamedTuple, cast

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnp_experiments.training import LaneState, Setup, Tree, as_inputs

_AT_ONCE = 200


class Evaluation(NamedTuple):
  """Accuracy and loss of each lane on a set of images."""

  accuracy: np.ndarray
  loss: np.ndarray


def evaluate(setup: Setup, state: LaneState, images: np.ndarray, labels: np.ndarray) -> Evaluation:
  """Compute accuracy and mean loss of each lane; a diverged lane is at chance, with loss NaN."""
  stack = (state.params, state.model_state)
  lanes = len(jax.tree.leaves(stack)[0])
  # One lane at a time for networks whose stacks are slow.
  stacks = (
    [stack]
    if setup.stacked
    else [
      jax.tree.map(lambda leaf, lane=lane: leaf[lane : lane + 1], stack) for lane in range(lanes)
    ]
  )
  correct, loss = np.zeros(lanes, np.int64), np.zeros(lanes)
  for start in range(0, len(images), _AT_ONCE):
    chunk = _pad(images[start : start + _AT_ONCE], labels[start : start + _AT_ONCE])
    parts = [_evaluate_chunk(setup.model, setup.stacked, *stack, *chunk) for stack in stacks]
    chunk_correct, chunk_loss = (np.concatenate(part) for part in zip(*parts, strict=True))
    correct += chunk_correct
    loss += chunk_loss
  return Evaluation(correct / labels.size, loss / labels.size)


@functools.partial(jax.jit, static_argnames=("model", "stacked"))
def _evaluate_chunk(
  model: nn.Module,
  stacked: bool,
  params: Tree,
  model_state: dict,
  images: jax.Array,
  labels: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  def lane(params: Tree, model_state: dict) -> tuple[jax.Array, jax.Array]:
    logits = cast(
      jax.Array,
      model.apply({"params": params, **model_state}, as_inputs(images), train=False),
    )
    counted = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    correct = counted & (jnp.argmax(logits, axis=-1).astype(jnp.int32) == labels)
    return jnp.sum(correct), jnp.sum(jnp.where(counted, losses, 0))

  if stacked:
    return jax.vmap(lane)(params, model_state)
  correct, loss = lane(*jax.tree.map(lambda leaf: leaf[0], (params, model_state)))
  return correct[None], loss[None]


def _pad(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Pad a chunk with images of label -1, so that all chunks share one compiled program."""
  short = (0, _AT_ONCE - len(images))
  return (
    np.pad(images, [short] + [(0, 0)] * (images.ndim - 1)),
    np.pad(labels.astype(np.int32), [short] + [(0, 0)] * (labels.ndim - 1), constant_values=-1),
  )
