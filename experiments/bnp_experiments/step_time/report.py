"""The tables and the picture of `step_time`, from its results alone."""

from collections.abc import Sequence
import pathlib
from typing import Any

from matplotlib.axes import Axes
import numpy as np
from rich.table import Table

from bnp_experiments import figures, methods, report
from bnp_experiments.methods import SGD, Method
from bnp_experiments.results import Record

Measured = Sequence[tuple[Any, Record]]


def tables(measured: Measured) -> list[tuple[Table, str]]:
  """Return the tables of the time of a step and of its compiled program.

  Args:
    measured: Cells of `step_time` with their records.

  Returns:
    Each table for the terminal, and the same table in Markdown.
  """
  return [_times(measured), _programs(measured)]


def draw(measured: Measured, folder: pathlib.Path) -> pathlib.Path | None:
  """Draw the time against batch, width and image, and the compile time against the layers.

  Args:
    measured: Cells of `step_time` with their records.
    folder: The folder of the picture.

  Returns:
    The path of the picture; None if there is nothing to draw.
  """
  present = [name for name in _PANELS if any(cell.series == name for cell, _ in measured)]
  if not present:
    return None
  with figures.plt.style.context(figures.STYLE):
    columns, rows = min(2, len(present)), -(-len(present) // 2)
    figure, panels = figures.plt.subplots(
      *(rows, columns),
      figsize=(5.2 * columns, 5 * rows),
      squeeze=False,
      gridspec_kw={"wspace": 0.3, "hspace": 0.6},
    )
    for axes in panels.flat[len(present) :]:
      axes.remove()
    for name, axes in zip(present, panels.flat, strict=False):
      _PANELS[name](axes, [(cell, record) for cell, record in measured if cell.series == name])
      axes.set_xscale("log", base=2)
      axes.set_xticks(sorted({x for line in axes.lines for x in line.get_xdata()}))
      axes.xaxis.set_major_formatter("{x:g}")
      if "relative" in axes.get_ylabel():
        axes.axhline(1, color=figures.INK, linewidth=0.8, zorder=1)
      axes.legend(
        frameon=False, fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(-0.05, -0.15)
      )
    path = folder / "step-time.png"
    figure.savefig(path, dpi=200, bbox_inches="tight", facecolor="white")
    figures.plt.close(figure)
  return path


def _times(measured: Measured) -> tuple[Table, str]:
  """Return median and quartiles of the time of a step, relative to plain SGD."""
  compared = {method.name: method for cell, _ in measured for method in cell.methods[1:]}
  lines = []
  for cell, record in measured:
    texts = [*_names(cell), f"{1e3 * np.median(record['seconds'][SGD.name]):.2f}"]
    for name in compared:
      ratios = record["relative_to_sgd"].get(name)
      low, middle, high = np.percentile(ratios, [25, 50, 75]) if ratios else (0, 0, 0)
      texts.append(f"{middle:.2f} ({low:.2f}–{high:.2f})" if ratios else "")
    lines.append(tuple(texts))
  labels = (method.label for method in compared.values())
  return report.table(("network", "image", "batch", "SGD, ms", *labels), lines)


def _programs(measured: Measured) -> tuple[Table, str]:
  """Return the other costs of a step of BNP, relative to one of plain SGD."""
  columns = ("network", "image", "batch", "SGD's trace, compile", "trace", "compile", "both")
  columns += ("flops", "bytes", "memory", "state, bytes")
  lines = []
  for cell, record in measured:
    sgd, bnp = (record["programs"][method.name] for method in (SGD, methods.BNP))
    ratios = [
      bnp[kind] / sgd[kind]
      for kind in ("trace_seconds", "compile_seconds", "flops", "bytes_accessed", "peak_bytes")
    ]
    ratios.insert(2, _to_build(bnp) / _to_build(sgd))
    lines.append(
      (
        *_names(cell),
        f"{sgd['trace_seconds']:.2f} s, {sgd['compile_seconds']:.2f} s",
        *(f"{ratio:.2f}" for ratio in ratios),
        f"{bnp['state_bytes']:,}",
      )
    )
  return report.table(columns, lines)


def _names(cell: Any) -> tuple[str, str, str]:
  return cell.network.title, "x".join(map(str, cell.shape)), str(cell.batch_size)


def _to_build(program: dict[str, float]) -> float:
  return program["trace_seconds"] + program["compile_seconds"]


def _draw_batch(axes: Axes, measured: Measured) -> None:
  for method in measured[0][0].methods:
    line = [(cell.batch_size, r["relative_to_sgd"][method.name]) for cell, r in measured]
    _line(axes, line, method, method.label)
  axes.set(xlabel="batch size", ylabel="time of a step, relative to SGD")
  axes.set_title("FC 3072-100-100-10", loc="left")


def _draw_width(axes: Axes, measured: Measured) -> None:
  for method in measured[0][0].methods[1:]:
    for size, style in ((1, "-"), (60, ":")):
      line = [
        (cell.shape[0], record["relative_to_sgd"][method.name])
        for cell, record in measured
        if cell.batch_size == size
      ]
      _line(axes, line, method, f"{method.label}, batch size {size}", style)
  axes.set(xlabel="width n", ylabel="time of a step, relative to SGD", yscale="log")
  figures.label_plainly(axes)
  axes.set_title("FC n-n-10", loc="left")


def _draw_image(axes: Axes, measured: Measured) -> None:
  line = [(cell.shape[0], record["relative_to_sgd"][methods.BNP.name]) for cell, record in measured]
  _line(axes, line, methods.BNP_DEBIAS, methods.BNP_DEBIAS.label)
  axes.set(xlabel="height and width of an image", ylabel="time of a step, relative to SGD")
  axes.set_ylim(bottom=0)
  axes.set_title(f"CNN, batch size {measured[0][0].batch_size}", loc="left")


def _draw_layers(axes: Axes, measured: Measured) -> None:
  for method in measured[0][0].methods:
    for scanned, style in ((False, "-"), (True, ":")):
      line = [
        (cell.network.depth, _to_build(record["programs"][method.name]))
        for cell, record in measured
        if cell.network.scanned == scanned
      ]
      _line(axes, line, method, f"{method.label}{', scanned' * scanned}", style)
  axes.set(xlabel="layers", ylabel="processor seconds to trace and compile", yscale="log")
  figures.label_plainly(axes)
  axes.set_title("dense layers of 32", loc="left")


_PANELS = {
  "batch": _draw_batch,
  "width": _draw_width,
  "image": _draw_image,
  "layers": _draw_layers,
}


def _line(
  axes: Axes,
  points: Sequence[tuple[int, Any]],
  method: Method,
  label: str,
  style: str = "-",
) -> None:
  """Draw medians, with the quartiles as a band."""
  if not points:
    return
  places = [place for place, _ in points]
  low, middle, high = (
    np.array([np.percentile(values, [25, 50, 75]) for _, values in points]).reshape(-1, 3).T
  )
  figures.draw_line(axes, places, middle, method, style, band=(low, high), label=label)
