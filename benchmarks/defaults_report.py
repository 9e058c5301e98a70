"""The tables and pictures of `defaults.py`, from its records alone."""

from collections.abc import Iterator
import itertools
import math
import pathlib
from typing import Any

from grid import BATCH_SIZES, CORRECTED, NETWORKS, OPTIMIZER_NAMES, RATES, VARIANTS, Key
import numpy as np
from tables import head, mean_and_range, read, row

Records = list[dict[str, Any]]
Best = dict[Key, dict[str, np.ndarray]]
NAMES = ("alone", "paper", *CORRECTED)
SIZES = sorted(BATCH_SIZES)


def key_of(record: dict[str, Any]) -> Key:
  """Return the network, optimizer and batch size of a record."""
  return record["network"], record["optimizer"], record["batch_size"]


def measured(records: Records) -> Iterator[tuple[Key, str, np.ndarray]]:
  """Yield network, optimizer and batch size, a setting, and its accuracy in %, `[rates, seeds]`."""
  for record in records:
    if "accuracy" in record:
      yield key_of(record), record["setting"], 100 * np.array(record["accuracy"])


def best_accuracies(records: Records) -> Best:
  """Return the accuracy in % of each setting in each cell at its best rate, `[seeds]`."""
  best: Best = {}
  for key, setting, accuracy in measured(records):
    best.setdefault(key, {})[setting] = accuracy[accuracy.mean(axis=1).argmax()]
  order = itertools.product(NETWORKS, RATES, SIZES)
  return {key: best[key] for key in order if key in best}


def best_rates(records: Records) -> dict[Key, dict[str, float]]:
  """Return the learning rate of the highest mean accuracy, for each setting of a cell."""
  rates: dict[Key, dict[str, float]] = {}
  for key, setting, accuracy in measured(records):
    rates.setdefault(key, {})[setting] = RATES[key[1]][accuracy.mean(axis=1).argmax()]
  return rates


def rates_within_a_point(records: Records) -> dict[Key, dict[str, int]]:
  """Return the number of learning rates within a point of the best, for each setting of a cell."""
  widths: dict[Key, dict[str, int]] = {}
  for key, setting, accuracy in measured(records):
    means = accuracy.mean(axis=1)
    widths.setdefault(key, {})[setting] = int(np.sum(means >= means.max() - 1))
  return widths


def one_rate(records: Records) -> dict[tuple[str, str], dict[str, tuple[float, float, float]]]:
  """Compare one learning rate for all batch sizes with the best rate for each.

  Args:
    records: The records.

  Returns:
    For each network, optimizer and setting: the mean accuracy in % over the batch sizes with the
    best rate for each, with the best one rate, and that rate.
  """
  means: dict[tuple[str, str, str], dict[int, np.ndarray]] = {}
  for (network, optimizer, size), setting, accuracy in measured(records):
    means.setdefault((network, optimizer, setting), {})[size] = accuracy.mean(axis=1)
  found: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = {}
  for (network, optimizer, setting), sizes in means.items():
    if len(sizes) == len(BATCH_SIZES):
      each = float(np.mean([x.max() for x in sizes.values()]))
      one = np.mean(list(sizes.values()), axis=0)
      rate = RATES[optimizer][one.argmax()]
      found.setdefault((network, optimizer), {})[setting] = each, float(one.max()), rate
  return found


def report(path: pathlib.Path) -> None:
  """Print the tables of the page, and apply the rule."""
  records = read(path)
  best = best_accuracies(records)
  means = {
    key: {name: f"{accuracy.mean():.1f}" for name, accuracy in found.items()}
    for key, found in best.items()
  }
  _print_cells("network, optimizer, batch size", NAMES, means)
  complete = {key: found for key, found in best.items() if all(name in found for name in NAMES[1:])}
  _print_means_of_cells(complete)
  widths = rates_within_a_point(records)
  shown = itertools.product(("fc", "cnn"), ("sgd", "adam"), (1, 60, 512))
  print()
  _print_cells(
    "rates within a point of the best", NAMES, {key: widths[key] for key in shown if key in widths}
  )
  variants = (*VARIANTS, "q = 1")
  with_variants = {key: found for key, found in means.items() if found.keys() & {*variants}}
  print()
  _print_cells("variants of debias", ("debias", *variants), with_variants)
  _print_one_rate(records)
  _print_best_rates(records)
  _print_rule(complete)
  _print_tests(records)


def _print_cells(title: str, names: tuple[str, ...], cells: dict[Key, dict[str, Any]]) -> None:
  """Print a table with a line for each cell and a column for each setting."""
  print(head((title, *names), "l"))
  for key, found in cells.items():
    print(row([_label(*key), *(str(found.get(name, "")) for name in names)]))


def _print_means_of_cells(complete: Best) -> None:
  """Print the means over the cells of each network, of each batch size, and of all."""
  groups = {"network": NETWORKS, "batch size": {size: str(size) for size in SIZES}}
  for title, names in groups.items():
    print("\n" + head((title, "cells", *NAMES[1:]), "l"))
    for value, name in {**names, "all": "all"}.items():
      keys = [key for key in complete if value in (*key, "all")]
      means = [f"{np.mean([complete[key][n].mean() for key in keys]):.1f}" for n in NAMES[1:]]
      print(row([name, str(len(keys)), *means]))


def _print_one_rate(records: Records) -> None:
  print("\n" + head(("one rate for all batch sizes", *NAMES), "l"))
  found = one_rate(records)
  for network, optimizer in itertools.product(NETWORKS, RATES):
    accuracies = found.get((network, optimizer), {})
    texts = [
      "{:.1f} → {:.1f} at {:g}".format(*accuracies[n]) if n in accuracies else "" for n in NAMES
    ]
    print(row([_label(network, optimizer), *texts]))


def _print_best_rates(records: Records) -> None:
  """Print the best rate with `debias`; a star marks the lowest and the highest one of the grid."""
  print("\n" + head(("best rate with debias", *map(str, SIZES)), "l"))
  best = best_rates(records)
  for network, optimizer in itertools.product(NETWORKS, RATES):
    rates = [best.get((network, optimizer, size), {}).get("debias", math.nan) for size in SIZES]
    edges = min(RATES[optimizer]), max(RATES[optimizer])
    texts = [f"{rate:g}{'*' * (rate in edges)}" for rate in rates]
    print(row([_label(network, optimizer), *texts]))


def _print_rule(complete: Best) -> None:
  def mean(name: str) -> float:
    return float(np.mean([found[name].mean() for found in complete.values()]))

  winner = max(("paper", "debias", "debias, lag_guard=2"), key=mean)
  print(f"\nHighest: {winner}. Cells where it is below the paper's start by more than the range:")
  for key, found in complete.items():
    loss = found["paper"].mean() - found[winner].mean()
    if loss > np.ptp(found["paper"]):
      print(f"  {key}: {loss:.1f} points, range {np.ptp(found['paper']):.1f}")


def _print_tests(records: Records) -> None:
  """Print the accuracy on the test images by cell, and the means by batch size."""
  tested = {
    (*key_of(r), r["setting"]): 100 * np.array(r["test_accuracy"])
    for r in records
    if "test_accuracy" in r
  }
  print("\n" + head(("network, optimizer, batch size", "alone", "BNP"), "l"))
  for key in dict.fromkeys(key[:3] for key in tested):
    print(row([_label(*key), *(mean_and_range(tested[*key, s]) for s in ("alone", "debias"))]))
  sizes = sorted({size for _, _, size, _ in tested})
  print("\n| | " + " | ".join(f"batch size {b}" for b in sizes) + " |")
  print("| --- |" + " --: |" * len(sizes))
  for network, optimizer, setting in dict.fromkeys((n, o, s) for n, o, _, s in tested):
    keys = [(network, optimizer, size, setting) for size in sizes]
    means = [f"{np.mean(tested[key]):.1f}" for key in keys if key in tested]
    bnp, mark = (" with BNP", "**") if setting == "debias" else ("", "")
    print(row(f"{mark}{x}{mark}" for x in (_label(network, optimizer) + bnp, *means)))


def _label(network: str, optimizer: str, *batch_size: int) -> str:
  return ", ".join([NETWORKS[network], OPTIMIZER_NAMES[optimizer], *map(str, batch_size)])


def figure(path: pathlib.Path) -> None:
  """Draw the two pictures of the page beside the records."""
  best = best_accuracies(read(path))
  _draw_accuracy(best, path.with_suffix(".png"))
  _draw_gain(best, path.with_name(f"{path.stem}_gain.png"))


def _draw_accuracy(best: Best, path: pathlib.Path) -> None:
  """Draw the accuracy of FC and CNN against the batch size."""
  import matplotlib.pyplot as plt

  styles = {
    "alone": ("#A6A6A6", "s", "optimizer alone"),
    "paper": ("#56B4E9", "v", "BNP, the paper's start"),
    "debias": ("#0072B2", "o", "BNP"),
    "debias, bounded step": ("#999933", "X", "BNP, bounded step"),
  }
  shown = ("fc", "cnn")
  fig, axes = plt.subplots(
    len(shown), len(RATES), figsize=(11, 5.2), sharex=True, sharey=True, layout="constrained"
  )
  for axis, (network, optimizer) in zip(axes.flat, itertools.product(shown, RATES), strict=True):
    for setting, (colour, marker, label) in styles.items():
      points = [
        (batch_size, found[setting].mean())
        for (n, o, batch_size), found in best.items()
        if (n, o) == (network, optimizer) and setting in found
      ]
      if points:
        axis.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    axis.set_title(_label(network, optimizer), fontsize=10)
    axis.set_xscale("log")
    axis.set_xticks([1, 6, 60, 512], ["1", "6", "60", "512"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
  fig.supxlabel("batch size")
  fig.supylabel("accuracy on held-out images (%)")
  fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
  fig.savefig(path, dpi=150)


def _draw_gain(best: Best, path: pathlib.Path) -> None:
  """Draw what `debias` gains over the paper's start in each cell, in points."""
  import matplotlib.pyplot as plt

  fig, axes = plt.subplots(3, 2, figsize=(9, 6), sharex=True, sharey=True, layout="constrained")
  for axis, (network, title) in zip(axes.flat, NETWORKS.items(), strict=True):
    gains = np.full((len(RATES), len(SIZES)), np.nan)
    for (y, optimizer), (x, size) in itertools.product(enumerate(RATES), enumerate(SIZES)):
      found = best.get((network, optimizer, size), {})
      if {"paper", "debias"} <= found.keys():
        gains[y, x] = found["debias"].mean() - found["paper"].mean()
        text, strong = f"{gains[y, x]:+.1f}", abs(gains[y, x]) > 7
        axis.text(x, y, text, ha="center", va="center", color="w" if strong else "k")
    image = axis.imshow(gains, cmap="RdBu", vmin=-12, vmax=12, aspect="auto")
    axis.set_title(title, fontsize=10)
    axis.set_xticks(range(len(SIZES)), map(str, SIZES))
    axis.set_yticks(range(len(RATES)), [OPTIMIZER_NAMES[optimizer] for optimizer in RATES])
  fig.colorbar(image, ax=axes, extend="max", label="gain (points of accuracy)")
  fig.supxlabel("batch size")
  fig.savefig(path, dpi=150)
