"""The methods that the experiments compare: an optimizer, a normalization layer, a colour.

A method looks the same in every figure. The colours are Okabe and Ito's, and two of Tol's, told
apart by colour-blind readers; markers say it once more.
"""

from collections.abc import Callable
import dataclasses

import jax
import optax

import bnp_optax
from bnp_optax.experiments import models

Optimizer = Callable[[jax.Array], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Method:
  """One way to train a network.

  Attributes:
    name: What the command line and the records call it.
    label: What tables and figures call it.
    colour: Its colour in every figure.
    marker: Its marker in every figure.
    optimizer: Makes the optimizer for a learning rate, which may be traced.
    norm: Makes the network's normalization layers, if it has any.
  """

  name: str
  label: str
  colour: str
  marker: str
  optimizer: Optimizer
  norm: models.Norm | None = None


def _momentum(rate: jax.Array) -> optax.GradientTransformation:
  return optax.sgd(rate, momentum=0.9)


def _after_bnp(optimizer: Optimizer) -> Optimizer:
  return lambda rate: optax.chain(bnp_optax.scale_by_bnp(), optimizer(rate))


def _inside_bnp(optimizer: Optimizer) -> Optimizer:
  return lambda rate: bnp_optax.bnp(optimizer(rate))


SGD = Method("sgd", "SGD", "#777777", "s", optax.sgd)
BATCHNORM = Method("batchnorm", "BatchNorm", "#E69F00", "^", optax.sgd, models.batch_norm)
LAYERNORM = Method("layernorm", "LayerNorm", "#009E73", "D", optax.sgd, models.layer_norm)
BNP = Method("bnp", "BNP", "#0072B2", "o", _after_bnp(optax.sgd))
MOMENTUM = Method("momentum", "momentum", "#56B4E9", "v", _momentum)
BNP_CHAIN_MOMENTUM = Method(
  "bnp_chain_momentum", "BNP, then momentum", "#882255", "P", _after_bnp(_momentum)
)
BNP_MOMENTUM = Method("bnp_momentum", "bnp(momentum)", "#332288", "X", _inside_bnp(_momentum))
ADAM = Method("adam", "Adam", "#CC79A7", "<", optax.adam)
BNP_CHAIN_ADAM = Method("bnp_chain_adam", "BNP, then Adam", "#999933", ">", _after_bnp(optax.adam))
BNP_ADAM = Method("bnp_adam", "bnp(Adam)", "#D55E00", "h", _inside_bnp(optax.adam))

_ALL = [SGD, BATCHNORM, LAYERNORM, BNP]
_ALL += [MOMENTUM, BNP_CHAIN_MOMENTUM, BNP_MOMENTUM, ADAM, BNP_CHAIN_ADAM, BNP_ADAM]
METHODS = {method.name: method for method in _ALL}
