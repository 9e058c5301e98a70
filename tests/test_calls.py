"""`Call`: the axes of the inputs that are examples, positions and stacks."""

import jax.numpy as jnp
import pytest

from bnp_optax._calls import Call
from bnp_optax._layout import KernelLayout


def call(*shape, **kwargs):
  return Call(KernelLayout(), jnp.zeros(shape), **kwargs)


@pytest.mark.parametrize(
  ("shape", "stack", "leading"),
  [((5,), 0, ()), ((2, 5), 0, (2,)), ((2, 3, 4, 5), 0, (2, 3, 4)), ((2, 3, 4, 5), 2, (2,))],
)
def test_leading_axes_are_those_before_the_stack_and_the_features(shape, stack, leading):
  assert call(*shape, stack=stack).leading == leading


@pytest.mark.parametrize(
  ("example_axes", "batched", "expected"),
  [
    (0, True, ()),
    (1, True, (2,)),
    (2, True, (2, 3)),
    (9, True, (2, 3, 4)),
    (0, False, ()),
    (1, False, ()),
    (2, False, (2,)),
  ],
)
def test_the_example_shape_leads(example_axes, batched, expected):
  """A convolution of one map has no axis of examples."""
  assert call(2, 3, 4, 5, batched=batched).example_shape(example_axes) == expected


def test_the_stack_is_not_counted_as_examples():
  assert call(2, 3, 5, stack=1).example_shape(2) == (2,)


def test_statistics_lie_beside_their_kernel():
  assert call(2, 5).statistics_name == "layer_statistics"
  assert call(2, 5, kernel="lora_a").statistics_name == "layer_statistics_lora_a"
