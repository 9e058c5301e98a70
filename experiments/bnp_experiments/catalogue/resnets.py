"""The experiments with ResNets in section 5 of the paper, with the paper's claims, and one more.

Each experiment has the settings of the paper, with the learning rates of its Table 3. The scale
`laptop` uses a shallow network or few images.
"""

import dataclasses
import functools

from bnp_experiments import methods, models, resnet
from bnp_experiments.catalogue.section5 import SMOKE
from bnp_experiments.claims import Claim, better, comparable, gains_more
from bnp_experiments.experiment import Experiment

# Weight decay applies after BNP and before momentum. The learning rate of BatchNorm's network jumps
# to its full value after 400 steps; that of the others rises linearly over one epoch.
_RESNET_BATCHNORM = dataclasses.replace(
  methods.BATCHNORM,
  optimizer=methods.momentum,
  norm=resnet.batch_norm,
  weight_decay=1e-4,
  warmup=methods.Warmup(steps=400, linear=False),
)
_RESNET_GROUPNORM = dataclasses.replace(
  methods.GROUPNORM,
  optimizer=methods.momentum,
  weight_decay=1e-4,
  warmup=methods.Warmup(epochs=1),
)
_group_norm_32 = functools.partial(models.group_norm, num_groups=32)
_group_of_4 = functools.partial(models.group_norm, num_groups=None, group_size=4)
_RESNET_BNP = dataclasses.replace(
  methods.BNP,
  optimizer=methods.momentum,
  weight_decay=1e-4,
  warmup=methods.Warmup(epochs=1),
)
_RESNET_BNP_GROUPNORM = dataclasses.replace(
  methods.BNP_GROUPNORM,
  optimizer=methods.momentum,
  weight_decay=1.5e-4,
  warmup=methods.Warmup(epochs=1),
  network=(("init_scale", 0.1), ("use_bias", True)),
)
# Beside the paper's start of the running statistics, the library's default.
_RESNET_BNP_DEBIAS = dataclasses.replace(
  _RESNET_BNP,
  name="bnp_debias",
  label=methods.BNP_DEBIAS.label,
  colour=methods.BNP_DEBIAS.colour,
  marker=methods.BNP_DEBIAS.marker,
  debias=True,
)
_RESNET_BNP_BOUNDED = dataclasses.replace(
  _RESNET_BNP_DEBIAS,
  name="bnp_bounded",
  label="BNP, bounded step",
  colour="#88CCEE",
  marker="X",
  optimizer=methods.bounded_momentum,
  bnp="around",
)
_RESNET_BNP_GROUPNORM_DEBIAS = dataclasses.replace(
  _RESNET_BNP_GROUPNORM,
  name="bnp_groupnorm_debias",
  label="BNP + GroupNorm",
  colour="#CC79A7",
  marker="*",
  debias=True,
)
# Networks without normalization whose blocks start as their shortcuts.
_RESNET_MOMENTUM_ZERO = dataclasses.replace(
  methods.MOMENTUM,
  name="momentum_zero",
  label="momentum, zero init",
  weight_decay=1e-4,
  network=(("zero_init", True),),
)
_RESNET_BNP_ZERO = dataclasses.replace(
  _RESNET_BNP_DEBIAS,
  name="bnp_zero",
  label="BNP, zero init",
  colour="#9664FA",
  marker="<",
  network=(("zero_init", True),),
)
_RESNET_BNP_BOUNDED_ZERO = dataclasses.replace(
  _RESNET_BNP_BOUNDED,
  name="bnp_bounded_zero",
  label="BNP, bounded, zero init",
  colour="#C8C87D",
  marker="P",
  # Weights that are zero would hardly move with a bound relative to their norm.
  optimizer=functools.partial(methods.bounded_momentum, least_norm=1.0),
  network=(("zero_init", True),),
)
# The paper does not compare with GroupNorm at the settings of BNP + GroupNorm. At `laptop` both
# methods are searched over the same settings, with both readings of the paper's "group size 4".
_RESNET_GROUPNORM_SAME = dataclasses.replace(
  _RESNET_GROUPNORM,
  name="groupnorm_same",
  label="GroupNorm, as BNP + GN",
  colour="#DDCC77",
  marker="v",
  weight_decay=1.5e-4,
  network=(("init_scale", 0.1), ("use_bias", True)),
)


def _warmed_up(*compared: methods.Method) -> tuple[methods.Method, ...]:
  """Return methods whose learning rate rises over one epoch."""
  warmup = methods.Warmup(epochs=1)
  return tuple(dataclasses.replace(method, warmup=warmup) for method in compared)


def _searched(method: methods.Method) -> methods.Method:
  """Return a method whose initial scale and groups are also chosen on held-out images.

  The weight decay is 1.5e-4 for all of them, because a few epochs cannot distinguish it from 1e-4.
  """
  others = tuple((key, value) for key, value in method.network if key != "init_scale")

  def variant(scale: float, norm: models.Norm, reading: str = "") -> methods.Method:
    setting = f"initial scale {scale:g}{reading}"
    return dataclasses.replace(
      method,
      name=f"{method.name}, {setting}",
      label=setting,
      norm=norm,
      weight_decay=1.5e-4,
      network=(*others, ("init_scale", scale)),
    )

  return dataclasses.replace(
    method,
    variants=(
      variant(1.0, models.group_norm),
      variant(0.1, models.group_norm),
      variant(1.0, _group_of_4, ", 4 channels a group"),
      variant(0.1, _group_of_4, ", 4 channels a group"),
    ),
  )


_RESNET_CLAIMS = (
  Claim(
    "BNP + GroupNorm is faster than BatchNorm before the decay",
    better("bnp_groupnorm", "batchnorm", early=True),
  ),
  Claim("BNP + GroupNorm ends above GroupNorm", better("bnp_groupnorm", "groupnorm")),
  Claim("BatchNorm ends above GroupNorm", better("batchnorm", "groupnorm")),
)

FIG6_LEFT = Experiment(
  name="fig6-left",
  title="ResNet-110 on CIFAR-10, batch size 128",
  place="Figure 6 left, Table 3",
  network=resnet.ResNet(depth=110),
  dataset="cifar10",
  batch_sizes=(128,),
  methods=(
    _RESNET_BATCHNORM,
    _RESNET_GROUPNORM,
    _RESNET_BNP,
    _RESNET_BNP_GROUPNORM,
    _RESNET_GROUPNORM_SAME,
    _RESNET_BNP_DEBIAS,
    _RESNET_BNP_BOUNDED,
    _RESNET_BNP_GROUPNORM_DEBIAS,
  ),
  rates=(0.1,),
  epochs=164,
  seeds=5,
  augment="cifar",
  decays=(80, 120),
  paper_rates={"batchnorm": 1e-1, "groupnorm": 1e-1, "bnp": 1e-1, "bnp_groupnorm": 1e-1},
  claims=(
    *_RESNET_CLAIMS,
    Claim("BNP + GroupNorm ends where BatchNorm does", comparable("bnp_groupnorm", "batchnorm")),
    Claim("BNP alone gains less from the decay than BatchNorm", gains_more("batchnorm", "bnp")),
    Claim("BNP + GroupNorm gains more from it than BNP", gains_more("bnp_groupnorm", "bnp")),
    Claim("BNP is faster than BatchNorm before the decay", better("bnp", "batchnorm", early=True)),
    Claim("BNP alone ends below BatchNorm", better("batchnorm", "bnp")),
    Claim(
      "BNP ends higher with the default start than with the paper's", better("bnp_debias", "bnp")
    ),
    Claim(
      "BNP with the default start and a bounded step ends above BNP with the paper's start",
      better("bnp_bounded", "bnp"),
    ),
    Claim(
      "BNP with the default start and a bounded step ends where BatchNorm does",
      comparable("bnp_bounded", "batchnorm"),
    ),
    Claim(
      "BNP + GroupNorm ends higher with the default start than with the paper's",
      better("bnp_groupnorm_debias", "bnp_groupnorm"),
    ),
    Claim(
      "BNP + GroupNorm with the default start ends where BatchNorm does",
      comparable("bnp_groupnorm_debias", "batchnorm"),
    ),
  ),
  scales={
    "smoke": SMOKE | {"network": resnet.ResNet(depth=8), "rates": (0.1,)},
    # At this scale 400 steps are many epochs, so every method warms up over one epoch.
    "laptop": {
      "title": "ResNet-8 on CIFAR-10, batch size 128",
      "network": resnet.ResNet(depth=8),
      "methods": _warmed_up(
        _RESNET_BATCHNORM,
        _searched(_RESNET_GROUPNORM),
        _RESNET_BNP,
        _searched(_RESNET_BNP_GROUPNORM),
        _RESNET_BNP_DEBIAS,
        _RESNET_BNP_BOUNDED,
        _searched(_RESNET_BNP_GROUPNORM_DEBIAS),
      ),
      "rates": (0.03, 0.1, 0.3, 1.0),
      "epochs": 12,
      "selection_epochs": 6,
      "decays": (8, 10),
      "seeds": 2,
      "images": 5_000,
    },
  },
)

# Held-out images chose the groups and the initial scale in the ResNet-8 of `FIG6_LEFT`. The weight
# decays are those of the paper, and the rate is chosen again.
RESNET_20 = dataclasses.replace(
  FIG6_LEFT,
  name="resnet-20",
  title="ResNet-20 on CIFAR-10, batch size 128",
  place="",
  network=resnet.ResNet(depth=20),
  methods=_warmed_up(
    _RESNET_BATCHNORM,
    _RESNET_BNP_BOUNDED,
    dataclasses.replace(_RESNET_GROUPNORM, norm=_group_of_4),
    dataclasses.replace(
      _RESNET_BNP_GROUPNORM_DEBIAS, norm=_group_of_4, network=(("use_bias", True),)
    ),
    _RESNET_BNP,
    _RESNET_BNP_DEBIAS,
    _RESNET_BNP_ZERO,
    _RESNET_BNP_BOUNDED_ZERO,
    _RESNET_MOMENTUM_ZERO,
  ),
  rates=(0.03, 0.1, 0.3),
  paper_rates={},
  claims=(
    Claim("BatchNorm ends above GroupNorm", better("batchnorm", "groupnorm")),
    Claim(
      "BNP with the default start and a bounded step ends where BatchNorm does",
      comparable("bnp_bounded", "batchnorm"),
    ),
    Claim(
      "BNP with the default start and a bounded step ends above BNP without the bound",
      better("bnp_bounded", "bnp", "bnp_debias"),
    ),
    Claim(
      "BNP + GroupNorm with the default start ends above GroupNorm",
      better("bnp_groupnorm_debias", "groupnorm"),
    ),
    Claim(
      "BNP + GroupNorm with the default start ends where BatchNorm does",
      comparable("bnp_groupnorm_debias", "batchnorm"),
    ),
    Claim(
      "BNP with blocks that start as shortcuts ends above BNP with a bounded step",
      better("bnp_zero", "bnp_bounded"),
    ),
    Claim(
      "BNP with blocks that start as shortcuts ends above momentum with them",
      better("bnp_zero", "momentum_zero"),
    ),
    Claim(
      "BNP with blocks that start as shortcuts ends where BatchNorm does",
      comparable("bnp_zero", "batchnorm"),
    ),
    Claim(
      "BNP with a bounded step and blocks that start as shortcuts ends above it without the bound",
      better("bnp_bounded_zero", "bnp_zero"),
    ),
    Claim(
      "BNP with a bounded step and blocks that start as shortcuts ends where BatchNorm does",
      comparable("bnp_bounded_zero", "batchnorm"),
    ),
  ),
  scales={
    "smoke": FIG6_LEFT.scales["smoke"],
    "laptop": {
      "epochs": 10,
      "selection_epochs": 4,
      "decays": (7, 9),
      "seeds": 2,
      "images": 5_000,
    },
  },
)

_METHODS_CIFAR100 = (
  _RESNET_BATCHNORM,
  _RESNET_GROUPNORM,
  _RESNET_BNP,
  dataclasses.replace(
    _RESNET_BNP_GROUPNORM,
    weight_decay=2e-4,
    network=(("init_scale", 0.4), ("use_bias", True)),
  ),
)
FIG6_RIGHT = dataclasses.replace(
  FIG6_LEFT,
  name="fig6-right",
  title="Preactivation ResNet-110 on CIFAR-100, batch size 128",
  place="Figure 6 right, Table 3",
  network=resnet.ResNet(depth=110, preactivation=True),
  dataset="cifar100",
  methods=_METHODS_CIFAR100,
  epochs=300,
  decays=(150, 220),
  paper_rates={"batchnorm": 1e-1, "groupnorm": 1e-1, "bnp": 1e-2, "bnp_groupnorm": 1e-1},
  claims=(
    *_RESNET_CLAIMS,
    Claim("BNP + GroupNorm ends below BatchNorm", better("batchnorm", "bnp_groupnorm")),
  ),
  scales={
    "smoke": FIG6_LEFT.scales["smoke"] | {"network": resnet.ResNet(8, preactivation=True)},
    "laptop": FIG6_LEFT.scales["laptop"]
    | {
      "title": "Preactivation ResNet-8 on CIFAR-100, batch size 128",
      "network": resnet.ResNet(8, preactivation=True),
      "methods": _warmed_up(*_METHODS_CIFAR100),
      "rates": (0.01, 0.03, 0.1, 0.3),
    },
  },
)

FIG7 = dataclasses.replace(
  FIG6_LEFT,
  name="fig7",
  title="ResNet-18 on ImageNet, batch size 256",
  place="Figure 7, Table 3",
  network=resnet.ResNet18(),
  dataset="imagenet",
  batch_sizes=(256,),
  methods=(
    dataclasses.replace(_RESNET_BATCHNORM, warmup=None),
    dataclasses.replace(_RESNET_GROUPNORM, warmup=None, norm=_group_norm_32),
    dataclasses.replace(
      _RESNET_BNP_GROUPNORM,
      warmup=None,
      weight_decay=8.5e-4,
      norm=_group_norm_32,
      network=(("use_bias", True),),
    ),
  ),
  epochs=100,
  seeds=1,
  decays=(30, 60, 90),
  augment="imagenet",
  paper_rates={"batchnorm": 1e-1, "groupnorm": 1e-1, "bnp_groupnorm": 1e-1},
  claims=(
    *_RESNET_CLAIMS,
    Claim("BNP + GroupNorm ends below BatchNorm", better("batchnorm", "bnp_groupnorm")),
  ),
  scales={
    "smoke": SMOKE | {"batch_sizes": (4,), "images": 20, "test_images": 8, "rates": (0.1,)},
    "laptop": {
      "batch_sizes": (32,),
      "epochs": 6,
      "decays": (3, 4, 5),
      "images": 2_000,
      "test_images": 1_000,
    },
  },
)

ALL = (FIG6_LEFT, RESNET_20, FIG6_RIGHT, FIG7)
