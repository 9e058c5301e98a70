"""The cost of a training step for each network and method: `bnp-optax run step-time`.

The images are random; no data is fetched. A cell is one network at one batch size. The step of
every method is compiled by itself, and then all are timed in rounds, one after the other, so that
other work on the machine affects all methods alike. Ratios are taken within a round. The results of
a cell are one record; a run resumes after the last one.
"""

from collections.abc import Callable
import contextlib
import math
import pathlib
import sys
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from bnp_experiments import timing
from bnp_experiments.methods import Method
from bnp_experiments.models import find_layers
from bnp_experiments.results import Record, Results, open_results, read_results, writing_to
from bnp_experiments.step_time import report
from bnp_experiments.step_time.cells import CLASSES, Cell, cells
import bnp_optax

NAME = "step-time"
TITLE = "Time, memory and compile time of a training step, relative to plain SGD"
_RATE = 1e-6
_SECONDS_A_SAMPLE = 0.05
_FEWEST_ROUNDS = 5


def run(scale: str, folder: pathlib.Path) -> None:
  """Measure the missing cells, and show all results.

  Args:
    scale: The scale: `smoke`, `laptop` or `paper`.
    folder: The folder of the results.

  Raises:
    ExperimentError: The results cannot be read or written.
  """
  console = Console()
  with open_results(folder, ["bnp-optax", *sys.argv[1:]]) as results:
    for cell in cells(scale):
      if not results.find(**cell.settings):
        console.print(f"{cell.network.title}, batch size {cell.batch_size}", highlight=False)
        results.append(cell.settings | measure(cell, seconds=1.0 if scale == "smoke" else 10.0))
    _show(scale, results, folder, console)


def draw(scale: str, folder: pathlib.Path) -> None:
  """Show the results so far."""
  _show(scale, read_results(folder), folder, Console())


def measure(cell: Cell, seconds: float) -> Record:
  """Compile and time the step of every method.

  Args:
    cell: The cell.
    seconds: Minimum time for all methods together.

  Returns:
    `seconds`, the time of a step of each method in each round; `relative_to_sgd`, its ratio to SGD
    in the same round; and `programs`, the cost of each compiled step, as in `Step.program`.
  """
  steps = {method.name: Step(cell, method) for method in cell.methods}
  rounds, end = [], time.perf_counter() + seconds
  while len(rounds) < _FEWEST_ROUNDS or time.perf_counter() < end:
    rounds.append({name: step.sample() for name, step in steps.items()})
  measured = {name: [times[name] for times in rounds] for name in steps}
  return {
    "seconds": measured,
    "relative_to_sgd": timing.relative_to_sgd(measured),
    "programs": {name: step.program for name, step in steps.items()},
  }


class Step:
  """The compiled training step of one method, and the state of its training.

  Attributes:
    compiled: The compiled step.
    program: Processor seconds to trace and to compile it, the operations and bytes by the
      compiler's count, its peak memory, and the bytes of the optimizer's state.
  """

  def __init__(self, cell: Cell, method: Method) -> None:
    """Compile the step of a method on the network and the batch of a cell."""
    model = method.adapt(cell.network)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(cell.batch_size, *cell.shape)), jnp.float32)
    labels = jnp.arange(cell.batch_size, dtype=jnp.int32) % CLASSES
    variables = _variables(model, images, rng)
    params = variables.pop("params")
    layers = find_layers(model, images)
    optimizer = method.make_optimizer(jnp.asarray(_RATE, jnp.float32), layers)
    # Without BNP, a user would not trace the statistics.
    sowing = bnp_optax.linen.sow_statistics if method.bnp else contextlib.nullcontext
    take_step = jax.jit(_training_step(model, optimizer, sowing), donate_argnums=0)
    opt_state = optimizer.init(params)
    self._state = (params, variables, opt_state)
    self._batch = (images, labels)
    # Processor time: compilation happens once, and rounds cannot remove the effect of other work.
    start = time.process_time()
    lowered = take_step.lower(self._state, *self._batch)
    traced = time.process_time()
    self.compiled = compiled = lowered.compile()
    compile_seconds = time.process_time() - traced
    counted: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    self.program = {
      "trace_seconds": traced - start,
      "compile_seconds": compile_seconds,
      "flops": counted["flops"],
      "bytes_accessed": counted["bytes accessed"],
      # Donated arguments become outputs.
      "peak_bytes": memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
      + memory.temp_size_in_bytes,
      "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state)),
    }
    self._take_step = take_step
    self._count = 1
    self.sample()
    # The second sample, after loading, determines the number of steps of the others.
    self._count = 5
    self._count = max(1, round(_SECONDS_A_SAMPLE / self.sample()))

  def sample(self) -> float:
    """Return the seconds of a step, over one sample of steps."""
    start = time.perf_counter()
    for _ in range(self._count):
      self._state = self._take_step(self._state, *self._batch)
    jax.block_until_ready(self._state)
    return (time.perf_counter() - start) / self._count


def _training_step(
  model: nn.Module,
  optimizer: optax.GradientTransformationExtraArgs,
  sowing: Callable[[], contextlib.AbstractContextManager[None]],
) -> Callable[[tuple[Any, dict[str, Any], Any], jax.Array, jax.Array], tuple[Any, Any, Any]]:
  """Return a step as users write it, from one state to the next."""

  def step(
    state: tuple[Any, dict[str, Any], Any], images: jax.Array, labels: jax.Array
  ) -> tuple[Any, Any, Any]:
    params, model_state, opt_state = state

    def loss_fn(params: Any) -> tuple[jax.Array, dict[str, Any]]:
      with sowing():
        logits, variables = model.apply(
          {"params": params, **model_state},
          images,
          train=True,
          mutable=["intermediates", *model_state],
        )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean(), dict(variables)

    grads, variables = jax.grad(loss_fn, has_aux=True)(params)
    stats = variables.pop("intermediates", {})
    updates, opt_state = optimizer.update(grads, opt_state, params, stats=stats)
    return optax.apply_updates(params, updates), variables, opt_state

  return step


def _variables(model: nn.Module, images: jax.Array, rng: np.random.Generator) -> dict[str, Any]:
  """Return variables of the right shapes, without denormal numbers, which are slow.

  The initializers of the model would take longer to compile than a step.
  """

  def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    fan_in = math.prod(leaf.shape[:-1])
    values = np.ones(leaf.shape) if leaf.ndim < 2 else rng.normal(size=leaf.shape) / fan_in**0.5
    return jnp.asarray(values, leaf.dtype)

  def init(key: jax.Array, images: jax.Array) -> Any:
    return model.init(key, images, train=False)

  return dict(jax.tree.map(fill, jax.eval_shape(init, jax.random.key(0), images)))


def _show(scale: str, results: Results, folder: pathlib.Path, console: Console) -> None:
  measured = [
    (cell, found[-1]) for cell in cells(scale) if (found := results.find(**cell.settings))
  ]
  markdown = []
  for table, text in report.tables(measured):
    markdown.append(text)
    console.print(table)
  with writing_to(folder):
    (folder / f"{NAME}.md").write_text("\n".join(markdown))
    if picture := report.draw(measured, folder):
      console.print(f"picture: {picture}", soft_wrap=True)
