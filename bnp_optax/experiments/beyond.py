"""The experiments that the paper does not have."""

import dataclasses

from bnp_optax.experiments import methods
from bnp_optax.experiments.claims import Claim, better, steady
from bnp_optax.experiments.experiment import Experiment
from bnp_optax.experiments.models import CNN, MLP
from bnp_optax.experiments.section5 import FOUR_DECADES, SMOKE

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
  timed=True,
  scales={"smoke": SMOKE},
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
  rates=(0.00003, *FOUR_DECADES, 3.0),
  epochs=None,
  seeds=3,
  timed=True,
  picture="rates",
  scales={"smoke": SMOKE},
)

BATCH_SIZES_FC = Experiment(
  name="batch-sizes-fc",
  title="FC on CIFAR-10 at every batch size, and at every learning rate",
  network=MLP(),
  dataset="cifar10",
  batch_sizes=(1, 2, 4, 6, 16, 60, 128, 512),
  methods=(
    methods.SGD,
    methods.BATCHNORM,
    methods.LAYERNORM,
    methods.BNP,
    methods.ADAM,
    methods.BNP_ADAM,
    methods.CLIPPED_SGD,
    methods.MUON,
  ),
  rates=FOUR_DECADES,
  epochs=20,
  seeds=5,
  picture="batch_sizes",
  target=0.4,
  claims=(
    Claim("BNP reaches at batch size 1 what it does at 60", steady("bnp", 1, 60)),
    Claim("bnp(Adam) ends above Adam at batch size 1", better("bnp_adam", "adam", batch_size=1)),
    Claim("bnp(Adam) ends above Adam at batch size 60", better("bnp_adam", "adam", batch_size=60)),
    Claim(
      "bnp(Adam) ends above Adam at batch size 512", better("bnp_adam", "adam", batch_size=512)
    ),
    Claim("bnp(Adam) ends above BNP at batch size 1", better("bnp_adam", "bnp", batch_size=1)),
    Claim("bnp(Adam) ends above BNP at batch size 512", better("bnp_adam", "bnp", batch_size=512)),
  ),
  scales={
    "smoke": SMOKE,
    "laptop": {"epochs": 5, "selection_epochs": 3, "seeds": 3, "images": 10_000},
  },
)

BATCH_SIZES_CNN = dataclasses.replace(
  BATCH_SIZES_FC,
  name="batch-sizes-cnn",
  title="CNN on CIFAR-10 at every batch size, and at every learning rate",
  network=CNN(),
  scales={
    "smoke": SMOKE,
    "laptop": {
      "rates": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
      "epochs": 3,
      "selection_epochs": 1,
      "seeds": 2,
      "images": 5_000,
      "methods": (methods.SGD, methods.BATCHNORM, methods.BNP, methods.ADAM, methods.BNP_ADAM),
    },
  },
)

FIRST = (QUICKSTART, OPTIMIZERS)
LATER = (BATCH_SIZES_FC, BATCH_SIZES_CNN)
