"""Experiments that go beyond the paper."""

import dataclasses

from flax import linen as nn

from bnp_experiments import methods, transformers
from bnp_experiments.catalogue.section5 import FOUR_DECADES, SMOKE
from bnp_experiments.claims import Claim, better, comparable, steady
from bnp_experiments.experiment import Experiment
from bnp_experiments.models import CNN, MLP

QUICKSTART = Experiment(
  name="quickstart",
  title="BNP against BatchNorm, LayerNorm, plain SGD and Adam as the batch gets small",
  network=MLP(),
  dataset="mnist1d",
  batch_sizes=(60, 6, 1),
  methods=(
    methods.SGD,
    methods.BATCHNORM,
    methods.LAYERNORM,
    methods.ADAM,
    dataclasses.replace(methods.BNP_DEBIAS, name="bnp"),
    dataclasses.replace(methods.BNP_ADAM_DEBIAS, name="bnp_adam"),
  ),
  rates=(*FOUR_DECADES, 3.0),
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
    methods.BNP_DEBIAS,
    methods.BNP_ADAM_DEBIAS,
  ),
  rates=(0.00003, *FOUR_DECADES, 3.0),
  epochs=None,
  seeds=3,
  timed=True,
  untimed=("bnp_debias", "bnp_adam_debias"),
  picture="rates",
  panels=(
    ("sgd", "bnp", "momentum", "bnp_chain_momentum", "bnp_momentum", "bnp_debias"),
    ("sgd", "adam", "bnp_chain_adam", "bnp_adam", "bnp_adam_debias"),
  ),
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
    methods.ADAMW,
    methods.BNP_ADAM,
    methods.CLIPPED_SGD,
    methods.MUON,
    methods.BNP_DEBIAS,
    methods.BNP_ADAM_DEBIAS,
    methods.BNP_MUON_DEBIAS,
    methods.BNP_MUON_UNSCALED,
  ),
  rates=FOUR_DECADES,
  epochs=20,
  seeds=5,
  timed=True,
  # Their steps cost what those with the paper's start do.
  untimed=("bnp_debias", "bnp_adam_debias", "bnp_muon_debias", "bnp_muon_unscaled"),
  picture="batch_sizes",
  panels=(
    ("sgd", "batchnorm", "layernorm", "bnp", "bnp_adam", "clipped_sgd"),
    ("bnp", "adam", "adamw", "bnp_adam", "muon"),
    ("adam", "muon", "bnp_debias", "bnp_adam_debias", "bnp_muon_debias", "bnp_muon_unscaled"),
  ),
  target=0.35,
  claims=(
    Claim("BNP reaches at batch size 1 what it does at 60", steady("bnp", 1, 60)),
    Claim("bnp(Adam) ends above Adam at batch size 1", better("bnp_adam", "adam", batch_size=1)),
    Claim("bnp(Adam) ends above Adam at batch size 60", better("bnp_adam", "adam", batch_size=60)),
    Claim(
      "bnp(Adam) ends above Adam at batch size 512", better("bnp_adam", "adam", batch_size=512)
    ),
    Claim("bnp(Adam) ends above BNP at batch size 1", better("bnp_adam", "bnp", batch_size=1)),
    Claim("bnp(Adam) ends above BNP at batch size 512", better("bnp_adam", "bnp", batch_size=512)),
    Claim(
      "BNP ends higher with the default start than with the paper's, at batch size 512",
      better("bnp_debias", "bnp", batch_size=512),
    ),
    Claim(
      "bnp(Adam) ends higher with the default start than with the paper's, at batch size 512",
      better("bnp_adam_debias", "bnp_adam", batch_size=512),
    ),
    Claim(
      "BNP with the default start ends where BNP with the paper's start does at batch size 1",
      comparable("bnp_debias", "bnp", batch_size=1),
    ),
    Claim(
      "bnp(Adam) with the default start ends above Muon at batch size 60",
      better("bnp_adam_debias", "muon", batch_size=60),
    ),
    Claim(
      "bnp(Muon) with the default start and q = 1 ends above Muon at batch size 60",
      better("bnp_muon_unscaled", "muon", batch_size=60),
    ),
    Claim(
      "With the default start, bnp(Muon) ends higher with q = 1 than with the paper's q at 60",
      better("bnp_muon_unscaled", "bnp_muon_debias", batch_size=60),
    ),
  ),
  scales={
    "smoke": SMOKE
    | {
      "network": MLP((8, 8, 8)),
      "batch_sizes": (1, 60, 512),
      "images": 600,
      "timed": False,  # Other experiments time steps with fewer programs to compile.
      "methods": (
        methods.BNP,
        methods.ADAM,
        methods.BNP_ADAM,
        methods.MUON,
        methods.BNP_DEBIAS,
        methods.BNP_ADAM_DEBIAS,
        methods.BNP_MUON_DEBIAS,
        methods.BNP_MUON_UNSCALED,
      ),
    },
    "laptop": {"epochs": 5, "selection_epochs": 3, "seeds": 3, "images": 10_000},
  },
)

BATCH_SIZES_CNN = dataclasses.replace(
  BATCH_SIZES_FC,
  name="batch-sizes-cnn",
  title="CNN on CIFAR-10 at every batch size, and at every learning rate",
  network=CNN(),
  methods=BATCH_SIZES_FC.methods[:-2],
  claims=BATCH_SIZES_FC.claims[:-2],
  panels=(*BATCH_SIZES_FC.panels[:2], ("adam", "muon", "bnp_debias", "bnp_adam_debias")),
  scales={
    "smoke": BATCH_SIZES_FC.scales["smoke"]
    | {
      "network": CNN(filters=(4, 4, 4), width=8),
      "methods": BATCH_SIZES_FC.scales["smoke"]["methods"][:-2],
    },
    "laptop": {"epochs": 3, "seeds": 2, "images": 5_000},
  },
)


def _layer_norm(train: bool) -> nn.Module:
  del train
  return nn.LayerNorm()


_ADAM, _ADAMW, _MUON, _BNP_ADAM, _BNP_ADAMW, _BNP_ADAM_DEBIAS, _BNP_MUON_UNSCALED = (
  dataclasses.replace(method, norm=_layer_norm)
  for method in (
    methods.ADAM,
    methods.ADAMW,
    methods.MUON,
    methods.BNP_ADAM,
    methods.BNP_ADAMW,
    methods.BNP_ADAM_DEBIAS,
    methods.BNP_MUON_UNSCALED,
  )
)
_ADAM_PLAIN = dataclasses.replace(
  methods.ADAM, name="adam_plain", label="Adam, no LayerNorm", colour="#882255", marker="s"
)
_BNP_ADAM_PLAIN = dataclasses.replace(
  methods.BNP_ADAM,
  name="bnp_adam_plain",
  label="bnp(Adam), no LayerNorm, paper's start",
  colour="#DDCC77",
  marker="o",
)
_BNP_ADAM_DEBIAS_PLAIN = dataclasses.replace(
  methods.BNP_ADAM_DEBIAS,
  name="bnp_adam_debias_plain",
  label="bnp(Adam), no LayerNorm",
  colour="#321996",
  marker="p",
)

VIT = Experiment(
  name="vit",
  title="Vision transformer on CIFAR-10, with and without LayerNorm",
  network=transformers.ViT(),
  dataset="cifar10",
  batch_sizes=(64, 4),
  methods=(
    _ADAM,
    _ADAMW,
    _MUON,
    _BNP_ADAM,
    _BNP_ADAMW,
    _ADAM_PLAIN,
    _BNP_ADAM_PLAIN,
    _BNP_ADAM_DEBIAS,
    _BNP_ADAM_DEBIAS_PLAIN,
    _BNP_MUON_UNSCALED,
  ),
  rates=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
  epochs=30,
  seeds=5,
  claims=(
    Claim("bnp(Adam) ends above Adam at batch size 64", better("bnp_adam", "adam", batch_size=64)),
    Claim(
      "bnp(Adam) ends above AdamW and Muon at batch size 64",
      better("bnp_adam", "adamw", "muon", batch_size=64),
    ),
    Claim("bnp(Adam) ends above Adam at batch size 4", better("bnp_adam", "adam", batch_size=4)),
    Claim(
      "Without LayerNorm, bnp(Adam) ends above Adam at batch size 64",
      better("bnp_adam_plain", "adam_plain", batch_size=64),
    ),
    Claim(
      "bnp(Adam) without LayerNorm ends where Adam with it does, at batch size 64",
      comparable("bnp_adam_plain", "adam", batch_size=64),
    ),
    Claim(
      "bnp(Adam) ends higher with the default start than with the paper's, at batch size 64",
      better("bnp_adam_debias", "bnp_adam", batch_size=64),
    ),
    Claim(
      "Without LayerNorm, bnp(Adam) ends higher with the default start, at batch size 64",
      better("bnp_adam_debias_plain", "bnp_adam_plain", batch_size=64),
    ),
    Claim(
      "bnp(Muon) with the default start and q = 1 ends above Muon at batch size 64",
      better("bnp_muon_unscaled", "muon", batch_size=64),
    ),
  ),
  scales={
    "smoke": SMOKE | {"network": transformers.ViT(blocks=1, width=8), "images": 100},
    "laptop": {
      "epochs": 4,
      "seeds": 2,
      "images": 8_000,
      "test_images": 2_000,
    },
  },
)

LANGUAGE_MODEL = dataclasses.replace(
  VIT,
  name="language-model",
  title="Transformer that predicts the next character of Python's language reference",
  network=transformers.LanguageModel(),
  dataset="pydoc",
  scales={
    "smoke": VIT.scales["smoke"] | {"network": transformers.LanguageModel(blocks=1, width=8)},
    "laptop": {**VIT.scales["laptop"], "rates": VIT.rates[1:], "images": None},
  },
)

FIRST = (QUICKSTART, OPTIMIZERS)
LATER = (BATCH_SIZES_FC, BATCH_SIZES_CNN, VIT, LANGUAGE_MODEL)
