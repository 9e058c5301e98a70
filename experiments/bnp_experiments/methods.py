"""The methods that the experiments compare: an optimizer, a normalization layer, a colour.

A method has the same colour and marker in every figure, notebook and page. The colours are those of
Okabe and Ito and of Tol. Methods in one panel are distinct for colour-blind readers; a test checks
this.

A BNP method without "paper's start" in its label has the library's default start of the running
statistics; its name ends in `_debias` where an experiment has both.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from bnp_experiments import models
import bnp_optax
from bnp_optax import normalization

Rate = jax.Array | optax.Schedule
Optimizer = Callable[[Rate], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Warmup:
  """A learning rate that starts at a tenth of the full rate.

  The full rate is reached after `steps` steps plus `epochs` epochs.

  Attributes:
    steps: Number of steps.
    epochs: Number of epochs.
    linear: Whether the rate rises linearly, or is constant and then jumps.
  """

  steps: int = 0
  epochs: float = 0.0
  linear: bool = True

  def factor(self, count: jax.Array, epoch: int) -> jax.Array:
    """Return the factor of the rate at step `count`, for epochs of `epoch` steps."""
    done = jnp.minimum(count.astype(jnp.float32) / (self.steps + self.epochs * epoch), 1.0)
    return 0.1 + 0.9 * (done if self.linear else jnp.floor(done))


@dataclasses.dataclass(frozen=True)
class Method:
  """One way to train a network.

  Attributes:
    name: Name on the command line and in the records.
    label: Name in tables and figures.
    colour: Its colour in every figure.
    marker: Its marker in every figure.
    optimizer: Function that returns the optimizer for a learning rate, traced or a schedule.
    bnp: "before" for BNP before the optimizer in a chain, "around" for the optimizer inside
      `bnp_optax.bnp`; None for no BNP.
    debias: Whether BNP removes the bias of the initial running statistics.
    scale_layers: Whether BNP divides by the paper's q; q is 1 otherwise.
    bnp_arguments: Other arguments of BNP, as pairs of a name and its value.
    norm: Function that returns a normalization layer; None for no normalization.
    network: Other changes of the network, as pairs of a field and its value.
    weight_decay: Factor of the weights that is added to the gradient, after BNP.
    warmup: The warm-up of the learning rate; None for the full rate from the start.
    variants: Methods with other settings and other names, one of which is selected together with
      the learning rate; empty for this method alone.
  """

  name: str
  label: str
  colour: str
  marker: str
  optimizer: Optimizer
  bnp: Literal["before", "around"] | None = None
  norm: models.Norm | None = None
  network: tuple[tuple[str, Any], ...] = ()
  weight_decay: float = 0.0
  warmup: Warmup | None = None
  variants: tuple["Method", ...] = ()
  debias: bool = False
  scale_layers: bool = True
  bnp_arguments: tuple[tuple[str, Any], ...] = ()

  def make_optimizer(
    self, rate: Rate, layers: bnp_optax.Layers
  ) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer for a learning rate and the layers of a network."""
    inner = self.optimizer(rate)
    if self.weight_decay:
      inner = optax.chain(optax.add_decayed_weights(self.weight_decay), inner)
    settings = {"debias": self.debias, "scale_layers": self.scale_layers, "layers": layers}
    settings |= dict(self.bnp_arguments)
    if self.bnp == "before":
      return optax.chain(bnp_optax.scale_by_bnp(**settings), inner)
    if self.bnp == "around":
      return bnp_optax.bnp(inner, **settings)
    return optax.with_extra_args_support(inner)

  def adapt(self, network: nn.Module) -> nn.Module:
    """Return the network with the changes of this method."""
    return network.clone(norm=self.norm, **dict(self.network))


def momentum(rate: Rate) -> optax.GradientTransformation:
  """Return SGD with momentum 0.9."""
  return optax.sgd(rate, momentum=0.9)


def bounded_momentum(rate: Rate, least_norm: float = 1e-3) -> optax.GradientTransformation:
  """Return SGD with momentum 0.9 and a bound on the step of each unit.

  The bound is a part of the norm of the unit's weights, or of `least_norm` if the norm is less.
  """
  return optax.chain(momentum(rate), optax.adaptive_grad_clip(0.03, least_norm))


def _four_things(
  train: bool, ghost_size: int | None = None, num_groups: int | None = None
) -> nn.Module:
  """Return BatchNorm with 4 things; the weight of the example in inference is not tuned."""
  return normalization.GhostBatchNorm(
    use_running_average=not train,
    momentum=0.99,
    epsilon=1e-3,
    ghost_size=ghost_size,
    num_groups=num_groups,
    example_weight=0.1,
  )


def _four_things_adam(rate: Rate) -> optax.GradientTransformation:
  return optax.chain(normalization.add_decayed_scale_and_bias(1e-4), optax.adam(rate))


def _clipped_sgd(rate: Rate) -> optax.GradientTransformation:
  return optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(rate))


SGD = Method("sgd", "SGD", "#A6A6A6", "s", optax.sgd)
BATCHNORM = Method("batchnorm", "BatchNorm", "#E69F00", "^", optax.sgd, norm=models.batch_norm)
LAYERNORM = Method("layernorm", "LayerNorm", "#009E73", "D", optax.sgd, norm=models.layer_norm)
BNP = Method("bnp", "BNP, paper's start", "#332288", "p", optax.sgd, "before")
MOMENTUM = Method("momentum", "momentum", "#882255", "v", momentum)
BNP_CHAIN_MOMENTUM = Method(
  *("bnp_chain_momentum", "BNP, then momentum, paper's start", "#56B4E9", "P"), momentum, "before"
)
BNP_MOMENTUM = Method(
  "bnp_momentum", "bnp(momentum), paper's start", "#DDCC77", "X", momentum, "around"
)
ADAM = Method("adam", "Adam", "#000000", "<", optax.adam)
BNP_CHAIN_ADAM = Method(
  *("bnp_chain_adam", "BNP, then Adam, paper's start", "#661100", ">"), optax.adam, "before"
)
BNP_ADAM = Method("bnp_adam", "bnp(Adam), paper's start", "#117733", "H", optax.adam, "around")
ADAMW = Method("adamw", "AdamW", "#661100", "1", optax.adamw)
BNP_ADAMW = Method("bnp_adamw", "bnp(AdamW), paper's start", "#56B4E9", "d", optax.adamw, "around")
MUON = Method("muon", "Muon", "#CC79A7", "2", optax.contrib.muon)
CLIPPED_SGD = Method("clipped_sgd", "SGD, adaptive clipping", "#661100", "*", _clipped_sgd)
BATCHRENORM = Method(
  "batchrenorm", "Batch Renorm", "#882255", "8", optax.sgd, norm=models.batch_renorm
)
GROUPNORM = Method("groupnorm", "GroupNorm", "#661100", "d", optax.sgd, norm=models.group_norm)
BNP_GROUPNORM = Method(
  *("bnp_groupnorm", "BNP + GroupNorm, paper's start", "#9664FA", "H"),
  optax.sgd,
  "before",
  models.group_norm,
)
ADAM_BATCHNORM = Method(
  "adam_batchnorm", "BatchNorm, Adam", "#882255", "X", optax.adam, norm=models.batch_norm
)
# With the library's default start of the running statistics.
BNP_DEBIAS = Method("bnp_debias", "BNP", "#0072B2", "o", optax.sgd, "before", debias=True)
BNP_ADAM_DEBIAS = Method(
  "bnp_adam_debias", "bnp(Adam)", "#D55E00", "h", optax.adam, "around", debias=True
)
BNP_MUON_DEBIAS = Method(
  "bnp_muon_debias", "bnp(Muon)", "#DDCC77", "X", optax.contrib.muon, "around", debias=True
)
BNP_MUON_UNSCALED = dataclasses.replace(
  BNP_MUON_DEBIAS,
  name="bnp_muon_unscaled",
  label="bnp(Muon), q = 1",
  colour="#9664FA",
  marker="*",
  scale_layers=False,
)
# Ghost batches where the batch is large, groups of channels where it is small.
FOUR_THINGS = Method(
  *("four_things", "BatchNorm with 4 things", "#56B4E9", "v", _four_things_adam),
  norm=functools.partial(_four_things, ghost_size=32),
)
FOUR_THINGS_SMALL = dataclasses.replace(
  FOUR_THINGS, norm=functools.partial(_four_things, num_groups=8)
)

_ALL = [SGD, BATCHNORM, LAYERNORM, BNP, MOMENTUM, BNP_CHAIN_MOMENTUM, BNP_MOMENTUM, ADAM]
_ALL += [BNP_CHAIN_ADAM, BNP_ADAM, ADAMW, BNP_ADAMW, MUON, CLIPPED_SGD, BATCHRENORM]
_ALL += [GROUPNORM, BNP_GROUPNORM, ADAM_BATCHNORM, FOUR_THINGS]
_ALL += [BNP_DEBIAS, BNP_ADAM_DEBIAS, BNP_MUON_DEBIAS, BNP_MUON_UNSCALED]
METHODS = {method.name: method for method in _ALL}
