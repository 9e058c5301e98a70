"""The experiments without ResNets in section 5 of the paper, with the paper's claims.

Each experiment has the settings of the paper, with the learning rates of its Tables 2 and 3. We
chose the settings that the paper does not state, such as the number of epochs without a schedule.
On two CPU cores the scale `laptop` takes minutes to an hour and `smoke` takes seconds to minutes.
"""

import dataclasses
from typing import Any

from bnp_experiments import methods
from bnp_experiments.claims import (
  Claim,
  below,
  better,
  comparable,
  fails,
  falls_back,
  improves_by_kappa_of_D_squared,
  kappa_of_D,
  quicker,
  trains,
)
from bnp_experiments.experiment import Experiment
from bnp_experiments.models import CNN, MLP

SMOKE: dict[str, Any] = {
  "epochs": 1,
  "selection_epochs": 1,
  "seeds": 1,
  "images": 300,
  "test_images": 100,
  "rates": (0.003, 0.03),
}
FOUR_DECADES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_CNN_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)

FIG3_LEFT = Experiment(
  name="fig3-left",
  title="FC on MNIST, batch size 60",
  place="Figure 3 left, Table 2",
  network=MLP(),
  dataset="mnist",
  batch_sizes=(60,),
  methods=(methods.SGD, methods.BATCHNORM, methods.LAYERNORM, methods.BNP, methods.BNP_ADAM),
  rates=FOUR_DECADES,
  epochs=20,
  seeds=5,
  paper_rates={"sgd": 1e-1, "batchnorm": 5e-1, "layernorm": 1e-1, "bnp": 5e-1},
  claims=(
    Claim("BNP is comparable with BatchNorm", comparable("bnp", "batchnorm")),
    Claim("BatchNorm is faster than BNP at the start", better("batchnorm", "bnp", early=True)),
    Claim("BNP ends above BatchNorm", better("bnp", "batchnorm")),
    Claim("BNP ends above LayerNorm", better("bnp", "layernorm")),
    Claim("BatchNorm ends above LayerNorm", better("batchnorm", "layernorm")),
    Claim("BNP ends above the vanilla network", better("bnp", "sgd")),
    Claim("BatchNorm ends above the vanilla network", better("batchnorm", "sgd")),
    Claim("LayerNorm ends above the vanilla network", better("layernorm", "sgd")),
  ),
  scales={"smoke": SMOKE, "laptop": {"epochs": 15, "selection_epochs": 5, "seeds": 3}},
)

FIG3_RIGHT = Experiment(
  name="fig3-right",
  title="FC on CIFAR-10, batch size 60",
  place="Figure 3 right, Table 2",
  network=MLP(),
  dataset="cifar10",
  batch_sizes=(60,),
  methods=FIG3_LEFT.methods,
  rates=FOUR_DECADES,
  epochs=30,
  seeds=5,
  paper_rates={"sgd": 1e-2, "batchnorm": 5e-1, "layernorm": 5e-1, "bnp": 1e-1},
  claims=(
    Claim("BNP is comparable with BatchNorm", comparable("bnp", "batchnorm")),
    Claim("BNP is faster than BatchNorm at the start", better("bnp", "batchnorm", early=True)),
    Claim("BNP overfits after some epochs", falls_back("bnp")),
    Claim("BatchNorm ends above BNP", better("batchnorm", "bnp")),
    Claim("BNP ends above the vanilla network", better("bnp", "sgd")),
    Claim("BNP ends above LayerNorm", better("bnp", "layernorm")),
    Claim("BatchNorm ends above the vanilla network", better("batchnorm", "sgd")),
    Claim("BatchNorm ends above LayerNorm", better("batchnorm", "layernorm")),
  ),
  scales={"smoke": SMOKE, "laptop": {"epochs": 20, "selection_epochs": 5, "seeds": 3}},
)

FIG4_LEFT = Experiment(
  name="fig4-left",
  title="FC on CIFAR-10, batch size 6",
  place="Figure 4 left, Table 2",
  network=MLP(),
  dataset="cifar10",
  batch_sizes=(6,),
  methods=(
    methods.SGD,
    methods.BATCHNORM,
    methods.BATCHRENORM,
    methods.LAYERNORM,
    methods.BNP,
    methods.BNP_ADAM,
  ),
  rates=FOUR_DECADES,
  epochs=20,
  seeds=5,
  paper_rates={
    "sgd": 5e-3,
    "batchnorm": 5e-2,
    "batchrenorm": 5e-2,
    "layernorm": 5e-2,
    "bnp": 5e-2,
  },
  claims=(
    Claim("BNP ends above BatchNorm", better("bnp", "batchnorm")),
    Claim("BNP ends above the vanilla network", better("bnp", "sgd")),
    Claim("Batch Renorm ends above BatchNorm", better("batchrenorm", "batchnorm")),
    Claim("LayerNorm ends above BatchNorm", better("layernorm", "batchnorm")),
    Claim("BNP is comparable with LayerNorm", comparable("bnp", "layernorm")),
    Claim("BNP is faster than Batch Renorm at the start", better("bnp", "batchrenorm", early=True)),
    Claim("Batch Renorm ends where BNP does", comparable("bnp", "batchrenorm")),
  ),
  scales={"smoke": SMOKE, "laptop": {"epochs": 5, "selection_epochs": 2, "seeds": 3}},
)

FIG4_RIGHT_FC = Experiment(
  name="fig4-right-fc",
  title="FC on CIFAR-10, batch size 1",
  place="Figure 4 right, Table 2",
  network=MLP(),
  dataset="cifar10",
  batch_sizes=(1,),
  methods=FIG4_LEFT.methods,
  rates=FOUR_DECADES,
  epochs=20,
  seeds=5,
  paper_rates={"sgd": 5e-4, "layernorm": 1e-2, "bnp": 1e-1},
  claims=(
    Claim("BNP, LayerNorm and the vanilla network train", trains("bnp", "layernorm", "sgd")),
    Claim("BatchNorm does not train", fails("batchnorm")),
    Claim("Batch Renorm does not train", fails("batchrenorm")),
    Claim("BNP is faster than the vanilla network", better("bnp", "sgd", early=True)),
    Claim("LayerNorm is faster than the vanilla network", better("layernorm", "sgd", early=True)),
    Claim("BNP ends below the vanilla network", better("sgd", "bnp")),
    Claim("LayerNorm ends below the vanilla network", better("sgd", "layernorm")),
  ),
  scales={"smoke": SMOKE, "laptop": {"epochs": 3, "selection_epochs": 1, "seeds": 3}},
)

FIG5_LEFT = Experiment(
  name="fig5-left",
  title="CNN on CIFAR-10, batch size 128",
  place="Figure 5 left, Table 3",
  network=CNN(),
  dataset="cifar10",
  batch_sizes=(128,),
  methods=(
    methods.ADAM,
    methods.BATCHNORM,
    methods.FOUR_THINGS,
    methods.BNP,
    dataclasses.replace(methods.BNP_ADAM, colour="#0B5D1E"),
    methods.ADAM_BATCHNORM,
    # Beside the paper's start of the running statistics, the library's default.
    methods.BNP_DEBIAS,
    methods.BNP_ADAM_DEBIAS,
  ),
  rates=(0.0001, *_CNN_RATES, 0.3),
  epochs=20,
  seeds=5,
  # The rate 1e-1 of the vanilla network is as printed in the paper, although it trains with Adam.
  paper_rates={"adam": 1e-1, "batchnorm": 1e-1, "four_things": 5e-3, "bnp": 1e-1},
  claims=(
    Claim("BNP is comparable with BatchNorm", comparable("bnp", "batchnorm")),
    Claim("BNP is comparable with BatchNorm with 4 things", comparable("bnp", "four_things")),
    Claim("BNP is slower than BatchNorm at the start", better("batchnorm", "bnp", early=True)),
    Claim(
      "4 things are faster than BatchNorm at the start",
      better("four_things", "batchnorm", early=True),
    ),
    Claim("BNP ends above the vanilla network", better("bnp", "adam")),
    Claim("BatchNorm ends above the vanilla network", better("batchnorm", "adam")),
    Claim("4 things end above the vanilla network", better("four_things", "adam")),
    Claim(
      "BNP ends higher with the default start than with the paper's", better("bnp_debias", "bnp")
    ),
    Claim(
      "BNP with the default start ends where BatchNorm does", comparable("bnp_debias", "batchnorm")
    ),
    Claim(
      "bnp(Adam) ends higher with the default start than with the paper's",
      better("bnp_adam_debias", "bnp_adam"),
    ),
  ),
  scales={
    "smoke": SMOKE,
    # The runs that choose rates have full length, because BatchNorm's averages with momentum 0.99
    # do not converge in the 140 steps of two epochs.
    "laptop": {"rates": _CNN_RATES, "epochs": 6, "seeds": 2, "images": 10_000},
  },
)

FIG5_RIGHT = Experiment(
  name="fig5-right",
  title="CNN on CIFAR-10, batch size 2",
  place="Figure 5 right, Table 3",
  network=CNN(),
  dataset="cifar10",
  batch_sizes=(2,),
  methods=(
    methods.SGD,
    methods.BATCHNORM,
    methods.BATCHRENORM,
    methods.FOUR_THINGS_SMALL,
    methods.BNP,
    methods.BNP_ADAM,
    methods.ADAM,
  ),
  rates=(0.00003, 0.0001, *_CNN_RATES, 0.3),
  epochs=20,
  # Trials of full length would take longer than the tested runs.
  selection_epochs=3,
  seeds=5,
  paper_rates={
    "sgd": 1e-3,
    "batchnorm": 1e-3,
    "batchrenorm": 1e-2,
    "four_things": 1e-4,
    "bnp": 1e-2,
  },
  claims=(
    Claim("BNP ends above BatchNorm", better("bnp", "batchnorm")),
    Claim("BNP ends above Batch Renorm", better("bnp", "batchrenorm")),
    Claim("BNP ends above BatchNorm with 4 things", better("bnp", "four_things")),
    Claim(
      "BatchNorm ends below all others",
      below("batchnorm", "sgd", "batchrenorm", "four_things", "bnp"),
    ),
    Claim("Plain SGD ends where Adam does", comparable("sgd", "adam")),
  ),
  scales={
    "smoke": SMOKE,
    "laptop": {
      "rates": (0.0001, *_CNN_RATES),
      "epochs": 3,
      "selection_epochs": 1,
      "seeds": 2,
      "images": 10_000,
    },
  },
)

FIG4_RIGHT_CNN = Experiment(
  name="fig4-right-cnn",
  title="CNN on CIFAR-10, batch size 1",
  place="Figure 4 right, Table 3",
  network=CNN(),
  dataset="cifar10",
  batch_sizes=(1,),
  methods=FIG5_RIGHT.methods,
  rates=FIG5_RIGHT.rates,
  epochs=20,
  selection_epochs=FIG5_RIGHT.selection_epochs,
  seeds=5,
  paper_rates={"sgd": 1e-3, "four_things": 1e-3, "bnp": 1e-1},
  claims=(
    Claim("BatchNorm does not train", fails("batchnorm")),
    Claim("Batch Renorm does not train", fails("batchrenorm")),
    Claim("BNP is faster than the vanilla network", better("bnp", "sgd", early=True)),
    Claim("BNP ends above the vanilla network", better("bnp", "sgd")),
    Claim("4 things end below BNP", better("bnp", "four_things")),
    Claim("4 things end below the vanilla network", better("sgd", "four_things")),
    Claim("Plain SGD ends where Adam does", comparable("sgd", "adam")),
  ),
  scales={"smoke": SMOKE, "laptop": FIG5_RIGHT.scales["laptop"]},
)

FIG8 = Experiment(
  name="fig8",
  title="Condition number of the Hessian of one unit, plain and preconditioned",
  place="Figure 8",
  network=MLP(features=(100, 100)),
  dataset="cifar10",
  batch_sizes=(60,),
  methods=(methods.SGD, methods.BNP),
  rates=FOUR_DECADES,
  epochs=20,
  seeds=5,
  picture="conditioning",
  claims=(
    Claim("kappa(D) is between 1e2 and 1e5", kappa_of_D(1e2, 1e5)),
    Claim(
      "P lowers the Hessian's condition number by about kappa(D)^2",
      improves_by_kappa_of_D_squared(),
    ),
    Claim("BNP is faster than the vanilla network", better("bnp", "sgd", early=True)),
  ),
  scales={
    "smoke": SMOKE | {"epochs": 2},
    "laptop": {"epochs": 5, "selection_epochs": 2, "seeds": 3},
  },
)

FIG9 = Experiment(
  name="fig9",
  title="Time of an epoch of BatchNorm and of BNP",
  place="Figure 9, Table 1",
  network=MLP(features=(100, 100)),
  dataset="cifar10",
  batch_sizes=(16, 256, 512),
  methods=(methods.SGD, methods.BATCHNORM, methods.BNP),
  rates=(0.03,),
  epochs=20,
  seeds=1,
  timed=True,
  picture="times",
  claims=(
    Claim("At batch size 16 BatchNorm is faster than BNP", quicker("batchnorm", "bnp", 16)),
    Claim("At batch size 256 BNP is faster than BatchNorm", quicker("bnp", "batchnorm", 256)),
    Claim("At batch size 512 BNP is faster than BatchNorm", quicker("bnp", "batchnorm", 512)),
  ),
  scales={"smoke": SMOKE | {"images": 600, "rates": (0.03,)}, "laptop": {"epochs": 1}},
)

# In the order of the paper, with the ResNets of Figures 6 and 7 between the two.
UP_TO_FIGURE_5 = (
  FIG3_LEFT,
  FIG3_RIGHT,
  FIG4_LEFT,
  FIG4_RIGHT_FC,
  FIG4_RIGHT_CNN,
  FIG5_LEFT,
  FIG5_RIGHT,
)
FROM_FIGURE_8 = (FIG8, FIG9)
