"""The figures of an experiment, drawn from its outcomes."""

from collections.abc import Iterable, Sequence
import pathlib
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, PercentFormatter
import numpy as np

from bnp_experiments.experiment import Experiment
from bnp_experiments.methods import Method
from bnp_experiments.outcomes import Outcome
from bnp_experiments.report import caption, count

matplotlib.use("Agg")
from matplotlib import pyplot as plt

INK = "#333333"
_CROWDED = 0.9
_WIDE = 20
# A run diverged if its loss exceeds the first number times the median loss of the first epoch. The
# axis then ends at the second number times this median.
_BLOWN_UP, _SHOWN = 10, 1.5
_RATES_SHOWN_AT = (1, 6, 60)
_ROW_GAP = 0.55
STYLE = {
  "font.size": 9,
  "axes.edgecolor": "#999999",
  "axes.labelcolor": INK,
  "axes.titlesize": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#E6E6E6",
  "grid.linewidth": 0.6,
  "xtick.color": INK,
  "ytick.color": INK,
  "text.color": INK,
}


def draw(
  experiment: Experiment, gathered: list[Outcome], folder: pathlib.Path, dpi: int = 200
) -> list[pathlib.Path]:
  """Draw the figures of an experiment and save them.

  Args:
    experiment: The experiment.
    gathered: Its outcomes.
    folder: The folder to save the figures in.
    dpi: Their resolution in pixels per inch.

  Returns:
    The paths of the figures.
  """
  if not gathered:
    return []
  drawn = []
  with plt.style.context(STYLE):
    for suffix, paint in _PICTURES[experiment.picture].items():
      figure = paint(experiment, gathered)
      drawn.append(folder / f"{experiment.name}{suffix}.png")
      figure.savefig(drawn[-1], dpi=dpi, bbox_inches="tight", facecolor="white")
      plt.close(figure)
  return drawn


def _curves(experiment: Experiment, gathered: list[Outcome]) -> Figure:
  """Draw accuracy above loss, with a column per batch size and bands over the seeds."""
  columns = len(experiment.batch_sizes)
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
        # 0 and 100 % are infinite on the logit axis that `_scale_accuracy` may choose.
        _line(accuracy, outcome, outcome.test_accuracy.clip(0.002, 0.998), "-")
        _line(loss, outcome, outcome.train_loss, "--")
  axes[0, 0].set_ylabel("test accuracy (solid)")
  axes[1, 0].set_ylabel("training loss (dashed)")
  _scale_accuracy(axes[0, 0], np.array([outcome.test_accuracy.max() for outcome in gathered]))
  clipped = _scale_loss(axes[1], gathered)
  figure.align_ylabels()
  _legend(experiment.methods, gathered, axes[0, 0])
  text = f"{caption(experiment)}: mean, and range as a band.{_chosen(experiment)}{clipped}"
  if axes[0, 0].get_yscale() == "logit":
    text += " Accuracies near 100 % are stretched (logit axis)."
  _footer(axes[1, 0], -0.4, text)
  return figure


def _batch_sizes(experiment: Experiment, gathered: list[Outcome]) -> Figure:
  """Draw accuracy, and the steps and seconds to the target accuracy, against batch size."""
  rows = experiment.panel_methods
  figure, panels = plt.subplots(
    *(len(rows), 3), figsize=(11, 3.6 * len(rows)), squeeze=False, sharey="col", sharex=True
  )
  for methods, (accuracy, *needed) in zip(rows, panels, strict=True):
    for method in methods:
      outcomes = [outcome for outcome in gathered if outcome.method == method]
      # An unfinished run may not have reached this method.
      if not outcomes:
        continue
      sizes = [outcome.batch_size for outcome in outcomes]
      final = np.array([outcome.final for outcome in outcomes]).reshape(len(outcomes), -1)
      steps = np.array([o.first_epoch(experiment.target) * o.steps for o in outcomes])
      seconds = np.array([np.median(o.seconds) if len(o.seconds) else np.nan for o in outcomes])
      draw_line(accuracy, sizes, final.mean(axis=1), method, band=(final.min(1), final.max(1)))
      for axes, values in zip(needed, (steps, steps * seconds), strict=True):
        draw_line(axes, sizes, values, method)
    _legend(methods, gathered, accuracy)
  for axes in panels.flat:
    axes.set_xscale("log", base=2)
    axes.set_xticks(experiment.batch_sizes, map(str, experiment.batch_sizes))
  for axes in panels[-1]:
    axes.set_xlabel("batch size")
  for accuracy, *_ in panels:
    accuracy.set_ylabel("test accuracy after the last epoch")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
  for column, unit in zip(panels.T[1:], ("steps", "seconds"), strict=True):
    # A logarithmic axis needs data, and there is none if no method reached the target.
    if any(np.isfinite(line.get_ydata()).any() for axes in column for line in axes.lines):
      column[0].set_yscale("log")
      label_plainly(column[0])
    for axes in column:
      axes.set_ylabel(f"{unit} to {experiment.target:.0%} test accuracy")
  figure.subplots_adjust(wspace=0.3, hspace=_ROW_GAP)
  text = f"{caption(experiment)}: mean, and range as a band.{_chosen(experiment)}"
  text += (
    "\nSteps are those of whole epochs: the accuracy is measured after each epoch. Where none are "
    "shown, it was not reached."
    "\nSeconds: steps times the median time of a step, measured by itself."
  )
  untimed = {o.method.label for o in gathered if o.method.name in experiment.untimed}
  if untimed:
    text += f"\nThe time of a step was not measured with {'; '.join(sorted(untimed))}."
  _footer(panels[-1, 0], -0.25, text)
  return figure


def _rates(experiment: Experiment, gathered: list[Outcome]) -> Figure:
  """Draw accuracy against learning rate, with a column per batch size."""
  sizes = sorted(experiment.batch_sizes)
  if len(sizes) > 3:
    sizes = [size for size in _RATES_SHOWN_AT if size in sizes] or sizes[:3]
  rows = experiment.panel_methods
  figure, panels = plt.subplots(
    *(len(rows), len(sizes)),
    figsize=(9, 3.6 * len(rows)),
    squeeze=False,
    sharey=True,
    sharex=True,
    gridspec_kw={"wspace": 0.08, "hspace": _ROW_GAP},
  )
  for methods, row in zip(rows, panels, strict=True):
    for axes, batch_size in zip(row, sizes, strict=True):
      axes.set_title(f"batch size {batch_size}", loc="left", weight="bold")
      axes.set_xscale("log")
      for outcome in gathered:
        if outcome.batch_size == batch_size and outcome.method in methods:
          draw_line(axes, outcome.rates, outcome.validation_accuracy, outcome.method)
    row[0].set_ylabel("accuracy on held-out images")
    row[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    _legend(methods, gathered, row[0])
  for axes in panels[-1]:
    axes.set_xlabel("learning rate")
  images = "" if experiment.images is None else f" ({experiment.images:,} training images)"
  _footer(
    *(panels[-1, 0], -0.25),
    f"{experiment.dataset}{images}, {experiment.network.title}, "
    f"{count(experiment.selection_length, 'epoch')}, one seed.",
  )
  return figure


def _times(experiment: Experiment, gathered: list[Outcome]) -> Figure:
  """Draw the time of an epoch as bars, with a group per batch size."""
  figure, axes = plt.subplots(figsize=(6, 3.6))
  width = 0.8 / len(experiment.methods)
  for number, method in enumerate(experiment.methods):
    shown = [outcome for outcome in gathered if outcome.method == method and len(outcome.seconds)]
    epochs = np.array(
      [np.percentile(outcome.seconds, [25, 50, 75]) * outcome.steps for outcome in shown]
    ).reshape(-1, 3)
    places = [experiment.batch_sizes.index(outcome.batch_size) for outcome in shown]
    axes.bar(
      *(np.array(places) + (number - (len(experiment.methods) - 1) / 2) * width, epochs[:, 1]),
      width=0.9 * width,
      yerr=np.abs(epochs[:, [0, 2]] - epochs[:, [1]]).T,
      error_kw={"elinewidth": 1, "ecolor": INK},
      color=method.colour,
    )
  axes.set_xticks(range(len(experiment.batch_sizes)), map(str, experiment.batch_sizes))
  axes.set_xlabel("batch size")
  axes.set_ylabel("seconds an epoch")
  _legend(experiment.methods, gathered, axes)
  _footer(axes, -0.25, f"{experiment.dataset}, {experiment.network.title}: median and quartiles.")
  return figure


def _conditioning(experiment: Experiment, gathered: list[Outcome]) -> Figure:
  """Draw the paper's three panels: learning curves, and condition numbers of Hessian and D."""
  figure, panels = plt.subplots(2, 2, figsize=(9, 7), gridspec_kw={"wspace": 0.3, "hspace": 0.35})
  (accuracy, loss), (hessian, d) = panels
  for outcome in gathered:
    _line(accuracy, outcome, outcome.test_accuracy, "-")
    _line(loss, outcome, outcome.train_loss, "-")
    if not outcome.conditioning:
      continue
    label = outcome.method.label
    lines = {"plain": (hessian, "-", f"{label}: Hessian")}
    for epsilons, style in (("paper", "--"), ("none", ":")):
      text = "the paper's epsilons" if epsilons == "paper" else "no epsilons"
      lines[f"preconditioned, epsilons {epsilons}"] = (
        *(hessian, style),
        f"{label}: preconditioned, {text}",
      )
      lines[f"D, epsilons {epsilons}"] = (d, style, f"{label}: D, {text}")
    for name, (axes, style, text) in lines.items():
      for run, values in enumerate(outcome.conditioning.get(name, [])):
        epochs = outcome.conditioning["steps"][run] / outcome.steps
        axes.plot(
          *(epochs, _smooth(values) if axes is hessian else values, style),
          color=outcome.method.colour,
          linewidth=1,
          label=None if run else text,
        )
  accuracy.set_ylabel("test accuracy")
  accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
  loss.set_ylabel("training loss")
  hessian.set_ylabel("condition number of the Hessian")
  d.set_ylabel("condition number of D")
  for axes in (hessian, d):
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(-0.03, -0.17))
  for axes in panels.flat:
    axes.set_xlabel("epochs")
  _legend(experiment.methods, gathered, accuracy)
  _footer(
    *(hessian, -0.55),
    f"{caption(experiment)}. First unit of the output layer, on the batch of each fifth step; "
    "Hessians as running medians of 15. One line\nfor each run. Without epsilons, kappa(D) is that "
    "of a unit that no longer fires: its running variance falls by 1 % a step.",
  )
  return figure


def _smooth(values: np.ndarray) -> np.ndarray:
  half = 7
  padded = np.pad(values, half, mode="symmetric")
  return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


_PICTURES = {
  "curves": {"": _curves},
  "batch_sizes": {"": _batch_sizes, "-rates": _rates},
  "rates": {"": _rates},
  "times": {"": _times},
  "conditioning": {"": _conditioning},
}


def _legend(methods: Sequence[Method], gathered: list[Outcome], axes: Axes) -> None:
  drawn = {outcome.method for outcome in gathered}
  handles = [
    Line2D([], [], color=m.colour, marker=m.marker, markersize=4, linewidth=1.8, label=m.label)
    for m in methods
    if m in drawn
  ]
  axes.figure.legend(
    handles=handles,
    loc="lower left",
    bbox_to_anchor=(-0.03, 1.1),
    bbox_transform=axes.transAxes,
    ncols=min(len(handles), 4),
    frameon=False,
  )


def _footer(axes: Axes, below: float, text: str) -> None:
  axes.text(0, below, text, transform=axes.transAxes, size=7.5, color="#666666", va="top")


def _chosen(experiment: Experiment) -> str:
  return " Rates chosen on held-out images." if len(experiment.rates) > 1 else ""


def _scale_accuracy(axes: Axes, best: np.ndarray) -> None:
  """Scale accuracies, with a logit axis if they are near 100 %."""
  if best.max() > _CROWDED:
    axes.set_yscale("logit")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(
      FixedLocator([0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995])
    )
  axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))


def _scale_loss(panels: Iterable[Axes], gathered: list[Outcome]) -> str:
  """Scale losses, and return a note for the footer.

  The axis is logarithmic if their range is wide, and ends below the losses of a run that diverged.
  """
  losses = np.concatenate([outcome.train_loss.ravel() for outcome in gathered])
  losses = losses[np.isfinite(losses)]
  if not losses.size:
    return ""
  low, high = losses.min(), losses.max()
  first = np.nanmedian([outcome.train_loss[0] for outcome in gathered])
  clipped = high > _BLOWN_UP * first
  if clipped:
    high = round(_SHOWN * first, 1)
  wide = 0 < low < high / _WIDE
  for axes in panels:
    if wide:
      axes.set_yscale("log")
      axes.yaxis.set_major_formatter("{x:g}")
    if clipped:
      axes.set_ylim(low / 1.1 if wide else low - 0.05 * (high - low), high)
  return f" Losses above {high:g} are not shown." if clipped else ""


def label_plainly(axes: Axes) -> None:
  """Label a logarithmic axis with plain numbers (1, 2, 5, 10, ...) instead of powers."""
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter("{x:g}")
  axes.yaxis.set_minor_locator(NullLocator())


def draw_line(
  axes: Axes,
  x: Sequence[float] | np.ndarray,
  y: np.ndarray,
  method: Method,
  style: str = "-",
  *,
  band: tuple[np.ndarray, np.ndarray] | None = None,
  **options: Any,
) -> None:
  """Draw a line in the colour and with the marker of a method.

  Args:
    axes: The axes.
    x: The places.
    y: The values.
    method: The method.
    style: Line style of matplotlib.
    band: The lower and the upper end of a band around the line; None for no band.
    **options: Other options of `matplotlib.axes.Axes.plot`.
  """
  options = {"markersize": 4, "linewidth": 1.6, **options}
  axes.plot(x, y, style, color=method.colour, marker=method.marker, **options)
  if band is not None:
    axes.fill_between(x, *band, color=method.colour, alpha=0.15, linewidth=0)


def _line(axes: Axes, outcome: Outcome, values: np.ndarray, style: str) -> None:
  """Draw the mean over the seeds against epochs, with the range as a band."""
  epochs = np.arange(1, len(values) + 1)
  band = values.min(axis=1), values.max(axis=1)
  every = max(1, len(epochs) // 6)
  mean = values.mean(axis=1)
  draw_line(axes, epochs, mean, outcome.method, style, band=band, markersize=3, markevery=every)
