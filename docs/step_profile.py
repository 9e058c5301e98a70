"""Where the time of a training step goes, kernel by kernel: plain SGD and BNP, FC 3072-100-100-10.

taskset -c 1 python docs/step_profile.py    (half a minute; the profile in performance.md)
"""

import collections
from collections.abc import Callable
import gzip
import json
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax
from bnp_optax.experiments.models import MLP

BATCHES, STEPS, SMALL = (1, 16, 60), 500, 2.0


def make_step(bnp: bool, batch: int) -> tuple[Callable[..., Any], Any, tuple[jax.Array, ...]]:
  """The compiled step, its first state and its batch."""
  model = MLP((100, 100))
  x = jax.random.uniform(jax.random.key(0), (batch, 3072))
  y = jnp.arange(batch, dtype=jnp.int32) % 10
  params = model.init(jax.random.key(1), x, train=True)["params"]
  tx = optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(1e-6)) if bnp else optax.sgd(1e-6)
  tx = optax.with_extra_args_support(tx)

  def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
    params, opt_state = state

    def loss_fn(params: Any) -> Any:
      if not bnp:
        logits, stats = model.apply({"params": params}, x, train=True), {}
      else:
        with bnp_optax.linen.sow_statistics():
          logits, aux = model.apply({"params": params}, x, train=True, mutable=["intermediates"])
        stats = aux["intermediates"]
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      return losses.mean(), stats

    grads, stats = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
    return optax.apply_updates(params, updates), opt_state

  state = (params, tx.init(params))
  return jax.jit(step, donate_argnums=0).lower(state, x, y).compile(), state, (x, y)


def profile(step: Any, state: Any, batch: tuple[jax.Array, ...]) -> dict[str, float]:
  """Microseconds, the median over steps, of each kernel and of what else the profiler names."""
  for _ in range(STEPS):
    state = step(state, *batch)
  jax.block_until_ready(state)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(STEPS):
        state = step(state, *batch)
      jax.block_until_ready(state)
    (file,) = pathlib.Path(folder).glob("**/*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
  taken: dict[str, list[float]] = collections.defaultdict(list)
  for event in events:
    if event.get("ph") == "X":
      taken[event["name"]].append(event["dur"])
  return {name: float(np.median(times)) for name, times in taken.items()}


def main() -> None:
  """Prints what takes more than two microseconds, and the sum of the kernels that take less."""
  for batch in BATCHES:
    for bnp in (False, True):
      step, *run = make_step(bnp, batch)
      taken = profile(step, *run)
      text = step.as_text()
      entry = text[text.index("ENTRY") :]
      kernels = dict(re.findall(r"%([\w.-]+) = (\(?\w+\[[\d,]*\])", entry))
      small = [taken[name] for name in kernels if 0 < taken.get(name, 0) < SMALL]
      total = sum(taken.get(name, 0) for name in kernels)
      print(f"\nbatch {batch}, {'BNP' if bnp else 'SGD'}: {total:.0f} us in kernels")
      for name in sorted(kernels, key=lambda name: -taken.get(name, 0)):
        if taken.get(name, 0) >= SMALL:
          operands = re.search(rf"%{re.escape(name)} = .*?\((.*?)\)", entry)
          read = " ".join(kernels.get(x, "?") for x in re.findall(r"%([\w.-]+)", operands[1]))
          print(f"  {taken[name]:6.1f}  {kernels[name]:14} {name:28} reads {read}")
      print(f"  {sum(small):6.1f}  {len(small)} kernels of less than {SMALL:.0f} us each")


if __name__ == "__main__":
  main()
