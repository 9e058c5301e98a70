"""The paper's networks, as Flax modules with a free choice of normalization layer.

Convolutions and residual networks take the same `Norm`, and the training loop knows no network.
"""

from collections.abc import Callable

from flax import linen as nn
import jax

Norm = Callable[[bool], nn.Module]
"""Makes a normalization layer; told whether it is for training (or else for inference)."""


def batch_norm(train: bool) -> nn.Module:
  """BatchNorm with the defaults of TensorFlow, which the paper uses."""
  return nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-3)


def layer_norm(train: bool) -> nn.Module:
  """LayerNorm with the defaults of TensorFlow, which the paper uses."""
  del train
  return nn.LayerNorm(epsilon=1e-3)


class MLP(nn.Module):
  """The fully connected network of section 5: hidden layers h -> norm(relu(W h + b)).

  The norm acts on what the next layer reads (eq. 2), so never on the images themselves.

  Attributes:
    features: Width of each hidden layer.
    classes: Number of outputs.
    norm: Makes the normalization layers; None for a network without any.
  """

  features: tuple[int, ...] = (100, 100, 100)
  classes: int = 10
  norm: Norm | None = None

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps images `[batch, ...]`, flattened, to logits `[batch, classes]`."""
    hidden = images.reshape(len(images), -1)
    for width in self.features:
      hidden = nn.relu(nn.Dense(width, kernel_init=nn.initializers.glorot_uniform())(hidden))
      if self.norm is not None:
        hidden = self.norm(train)(hidden)
    return nn.Dense(self.classes, kernel_init=nn.initializers.glorot_uniform())(hidden)

  @property
  def title(self) -> str:
    """What figures and records call this network, without its norm and its output layer."""
    return "FC " + "-".join(map(str, self.features))
