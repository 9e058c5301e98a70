"""The picture of an experiment: training loss and test accuracy against epochs."""

import pathlib

import matplotlib
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter
import numpy as np

from bnp_optax.experiments.experiment import Experiment
from bnp_optax.experiments.report import Outcome, caption

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_INK = "#333333"
_CROWDED = 0.9
_WIDE = 20
_STYLE = {
  "font.size": 9,
  "axes.edgecolor": "#999999",
  "axes.labelcolor": _INK,
  "axes.titlesize": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.color": "#E6E6E6",
  "grid.linewidth": 0.6,
  "xtick.color": _INK,
  "ytick.color": _INK,
  "text.color": _INK,
}


def draw(experiment: Experiment, gathered: list[Outcome], path: pathlib.Path) -> None:
  """Draws one panel a batch size: accuracy (solid) above loss (dashed), bands over the seeds.

  Args:
    experiment: What was run.
    gathered: What came out.
    path: Where the picture goes.
  """
  columns = len(experiment.batch_sizes)
  with plt.style.context(_STYLE):
    figure, axes = plt.subplots(
      *(2, columns),
      figsize=(9, 5.2),
      squeeze=False,
      sharex=True,
      sharey="row",
      gridspec_kw={"height_ratios": [3, 2], "hspace": 0.08, "wspace": 0.08},
    )
    for column, batch_size in enumerate(experiment.batch_sizes):
      accuracy, loss = axes[:, column]
      accuracy.set_title(f"batch size {batch_size}", loc="left", weight="bold")
      loss.set_xlabel("epochs")
      loss.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
      for outcome in gathered:
        if outcome.batch_size == batch_size:
          # 0 and 100 % lie at infinity on the axis that `_scale_accuracy` may take.
          _line(accuracy, outcome, outcome.test_accuracy.clip(0.002, 0.998), "-")
          _line(loss, outcome, outcome.train_loss, "--")
    axes[0, 0].set_ylabel("test accuracy (solid)")
    axes[1, 0].set_ylabel("training loss (dashed)")
    _scale_accuracy(axes[0, 0], np.array([outcome.test_accuracy.max() for outcome in gathered]))
    _scale_loss(axes[1, 0])
    figure.align_ylabels()
    handles = [
      Line2D([], [], color=m.colour, marker=m.marker, markersize=4, linewidth=1.8, label=m.label)
      for m in experiment.methods
    ]
    figure.legend(
      handles=handles,
      loc="lower left",
      bbox_to_anchor=(-0.03, 1.1),
      bbox_transform=axes[0, 0].transAxes,
      ncols=min(len(handles), 4),
      frameon=False,
    )
    figure.text(
      *(0, -0.4, _footer(experiment)), transform=axes[1, 0].transAxes, size=7.5, color="#666666"
    )
    figure.savefig(path, dpi=200, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def _scale_accuracy(axes: Axes, best: np.ndarray) -> None:
  """Where all are near 100 %, gives the last percents the room that they are compared in."""
  if best.max() > _CROWDED:
    axes.set_yscale("logit")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 0.995]))
  axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))


def _scale_loss(axes: Axes) -> None:
  """Gives the loss a logarithmic axis where it falls to a small part of what it was."""
  low, high = axes.dataLim.intervaly
  if low > 0 and high / low > _WIDE:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")


def _line(axes: Axes, outcome: Outcome, values: np.ndarray, style: str) -> None:
  epochs = np.arange(1, len(values) + 1)
  method = outcome.method
  axes.plot(
    *(epochs, values.mean(axis=1), style),
    color=method.colour,
    marker=method.marker,
    markersize=3,
    markevery=max(1, len(epochs) // 6),
    linewidth=1.6,
  )
  axes.fill_between(
    epochs, values.min(axis=1), values.max(axis=1), color=method.colour, alpha=0.15, linewidth=0
  )


def _footer(experiment: Experiment) -> str:
  return f"{caption(experiment)}: mean, and range as a band. Rates chosen on held-out images."
