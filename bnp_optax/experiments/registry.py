"""All experiments there are."""

from bnp_optax.experiments import methods
from bnp_optax.experiments.experiment import Experiment
from bnp_optax.experiments.models import MLP

QUICKSTART = Experiment(
  name="quickstart",
  title="BNP against BatchNorm, LayerNorm and plain SGD as the batch gets small",
  network=MLP(),
  dataset="digits",
  batch_sizes=(60, 6, 1),
  methods=(methods.SGD, methods.BATCHNORM, methods.LAYERNORM, methods.BNP),
  rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
  epochs=None,
  seeds=3,
)

OPTIMIZERS = Experiment(
  name="optimizers",
  title="SGD, momentum and Adam: alone, chained after BNP, and inside bnp()",
  network=MLP(),
  dataset="digits",
  batch_sizes=(60, 6, 1),
  methods=(
    methods.SGD,
    methods.BNP,
    methods.MOMENTUM,
    methods.BNP_CHAIN_MOMENTUM,
    methods.BNP_MOMENTUM,
    methods.ADAM,
    methods.BNP_CHAIN_ADAM,
    methods.BNP_ADAM,
  ),
  rates=(0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
  epochs=None,
  seeds=3,
)

EXPERIMENTS = {experiment.name: experiment for experiment in (QUICKSTART, OPTIMIZERS)}
