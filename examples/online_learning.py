"""Online learning in drifting light: predict each example once, then learn from it.

A camera reads handwritten digits, one after the other, while the light changes. Its contrast,
brightness and direction drift over some thousand examples, and a lamp is switched on halfway. Each
example occurs once in a stream, so there is no batch to average over and no test set. The measure
is the prequential accuracy: the accuracy of the predictions made before each label is revealed.

Every method trains the same network, FC 784-100-100-10, on one example at a time. Its learning rate
is the best one of a common grid on a separate stream of 4,000 held-out images. LayerNorm and
running BatchNorm normalize the inputs of every layer, including the image. BNP normalizes gradients
instead of activations, so the network itself has to adapt to the light. Therefore BNP and SGD also
run with only the image normalized, by the running mean and variance of each pixel.

python examples/online_learning.py    (two minutes of one CPU core)
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import pathlib
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pooch

import bnp_optax

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = pathlib.Path(__file__).parents[1] / "notebooks" / "results" / "online-learning"
CACHE = pathlib.Path(os.environ.get("BNP_OPTAX_DATA") or pathlib.Path.home() / ".cache/bnp_optax")
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
IMAGES_SHA256 = "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757"
LABELS_SHA256 = "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13"
Norm = Callable[[], nn.Module]
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SEEDS = (1, 2, 3)
CHOICE, STREAM, WINDOW = 4_000, 20_000, 500


class RunningBatchNorm(nn.Module):
  """BatchNorm for one example at a time, which always normalizes with its running averages."""

  decay: float = 0.99

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalize inputs ``[1, features]``."""
    features = x.shape[-1]
    mean = self.variable("batch_stats", "mean", jnp.zeros, features)
    variance = self.variable("batch_stats", "variance", jnp.ones, features)
    if not self.is_initializing():
      values = jax.lax.stop_gradient(x[0])
      mean.value += (1 - self.decay) * (values - mean.value)
      variance.value += (1 - self.decay) * ((values - mean.value) ** 2 - variance.value)
    scale = self.param("scale", nn.initializers.ones, (features,))
    bias = self.param("bias", nn.initializers.zeros, (features,))
    return (x - mean.value) / jnp.sqrt(variance.value + 1e-3) * scale + bias


class Network(nn.Module):
  """The fully connected network 784-100-100-10."""

  image_norm: Norm | None
  norm: Norm | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the logits of images ``[1, 784]``."""
    for width, norm in ((100, self.image_norm), (100, self.norm), (10, self.norm)):
      x = x if norm is None else norm()(x)
      x = nn.Dense(width)(x)
      x = nn.relu(x) if width > 10 else x
    return x


@dataclasses.dataclass(frozen=True)
class Method:
  """An optimizer and the normalization layers of the network that it trains."""

  label: str
  colour: str
  marker: str
  optimizer: Callable[[Any], optax.GradientTransformation]
  image_norm: Norm | None = None
  norm: Norm | None = None

  @property
  def network(self) -> Network:
    """The network that the method trains."""
    return Network(self.image_norm, self.norm)


def bnp_sgd(rate: Any) -> optax.GradientTransformation:
  """Return BNP before SGD."""
  return optax.chain(bnp_optax.scale_by_bnp(), optax.sgd(rate))


def bnp_adam(rate: Any) -> optax.GradientTransformation:
  """Return Adam in BNP's coordinates."""
  return bnp_optax.bnp(optax.adam(rate))


METHODS = (
  Method("SGD", "#A6A6A6", "s", optax.sgd),
  Method("Adam", "#000000", "<", optax.adam),
  Method("BNP", "#0072B2", "o", bnp_sgd),
  Method("bnp(Adam)", "#D55E00", "h", bnp_adam),
  Method("LayerNorm", "#009E73", "D", optax.sgd, nn.LayerNorm, nn.LayerNorm),
  Method("running BatchNorm", "#E69F00", "^", optax.sgd, RunningBatchNorm, RunningBatchNorm),
  Method("image normalized, SGD", "#DDCC77", "v", optax.sgd, RunningBatchNorm),
  Method("image normalized, BNP", "#661100", "p", bnp_sgd, RunningBatchNorm),
)


def light(phases: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return the contrast and the light ``[784]`` that falls on the page at example t."""

  def wave(i: int, period: float) -> jax.Array:
    return jnp.sin(2 * jnp.pi * (t / period + phases[i]))

  contrast = 0.55 + 0.35 * wave(0, 3_000)
  lamp = jnp.where(t >= STREAM // 2, 1.0, 0.0)
  across, down = jnp.meshgrid(jnp.linspace(-1, 1, 28), jnp.linspace(-1, 1, 28))
  falloff = across * wave(1, 7_000) + down * wave(2, 5_000)
  return contrast, (0.5 + 0.3 * wave(3, 4_000) + lamp + 0.4 * falloff).ravel()


@functools.partial(jax.jit, static_argnames="method")
def learn(
  method: Method,
  rates: jax.Array,
  variables: Any,
  orders: jax.Array,
  phases: jax.Array,
  images: jax.Array,
  labels: jax.Array,
) -> jax.Array:
  """Train one network per run; return whether each prediction was right, ``[runs, steps]``."""
  model = method.network

  def run(rate: jax.Array, variables: Any, order: jax.Array, phases: jax.Array) -> jax.Array:
    params = variables.pop("params")
    tx = optax.with_extra_args_support(method.optimizer(rate))

    def step(carry: Any, example: Any) -> tuple[Any, jax.Array]:
      params, opt_state, variables = carry
      t, i = example
      contrast, background = light(phases, t)
      x, y = contrast * images[i] / 255.0 + background, labels[i]

      def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        with bnp_optax.linen.sow_statistics():
          logits, aux = model.apply(
            {"params": params, **variables}, x[None], mutable=["intermediates", "batch_stats"]
          )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y[None]).mean()
        return loss, (logits, dict(aux))

      grads, (logits, aux) = jax.grad(loss_fn, has_aux=True)(params)
      stats = aux.pop("intermediates")
      updates, opt_state = tx.update(grads, opt_state, params, stats=stats)
      return (optax.apply_updates(params, updates), opt_state, aux), jnp.argmax(logits[0]) == y

    examples = (jnp.arange(len(order)), order)
    _, right = jax.lax.scan(step, (params, tx.init(params), variables), examples)
    return right

  return jax.vmap(run)(rates, variables, orders, phases)


def run(
  method: Method, pairs: Sequence[tuple[int, float]], images: np.ndarray, labels: np.ndarray
) -> np.ndarray:
  """Run a method for pairs of a seed and a rate; return whether each prediction was right."""
  seeds, rates = zip(*pairs, strict=True)
  network, keys = method.network, [jax.random.key(seed) for seed in seeds]
  variables = [dict(network.init(key, jnp.zeros((1, 784)))) for key in keys]
  generators = [np.random.default_rng(seed) for seed in seeds]
  right = learn(
    method,
    jnp.array(rates),
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables),
    jnp.array([generator.permutation(len(images))[:STREAM] for generator in generators]),
    jnp.array([generator.uniform(size=4) for generator in generators], jnp.float32),
    images,
    labels,
  )
  return np.asarray(right)


def measure(method: Method, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
  """Choose the learning rate of a method, and train it on the streams of all seeds."""
  start = time.perf_counter()
  held_out = images[-CHOICE:], labels[-CHOICE:]
  accuracies = run(method, [(0, rate) for rate in RATES], *held_out).mean(axis=1)
  rate = RATES[int(accuracies.argmax())]
  right = run(method, [(seed, rate) for seed in SEEDS], images[:-CHOICE], labels[:-CHOICE])
  windows = right.reshape(len(SEEDS), -1, WINDOW).mean(axis=2)
  return {
    "method": method.label,
    "rate": rate,
    "rates": dict(zip(map(str, RATES), accuracies.round(4).tolist(), strict=True)),
    "seeds": SEEDS,
    "window": WINDOW,
    "windows": windows.round(4).tolist(),
    "seconds": round(time.perf_counter() - start, 1),
    "versions": {"bnp_optax": bnp_optax.__version__, "jax": jax.__version__},
  }


def draw(results: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Plot accuracy over the stream (mean and range of the seeds) and against the learning rate."""
  figure, (stream, rates) = plt.subplots(
    1, 2, figsize=(10, 4.6), width_ratios=(3, 2), layout="constrained", sharey=True
  )
  for method, result in zip(METHODS, results, strict=True):
    windows = np.array(result["windows"])
    t = WINDOW * (np.arange(windows.shape[1]) + 0.5)
    low, high = windows.min(axis=0), windows.max(axis=0)
    style = {"color": method.colour, "marker": method.marker, "markersize": 4}
    stream.plot(t, windows.mean(axis=0), markevery=8, label=method.label, **style)
    stream.fill_between(t, low, high, color=method.colour, alpha=0.15, linewidth=0)
    rates.plot(RATES, result["rates"].values(), **style)
  stream.axvline(STREAM // 2, color="#999999", linestyle=":")
  stream.annotate("the lamp goes on", (STREAM // 2, 0.02), (4, 0), textcoords="offset points")
  stream.set(xlabel="examples seen", ylabel=f"prequential accuracy, over {WINDOW} examples")
  stream.set_ylim(0, 1)
  rates.set(xscale="log", xlabel="learning rate", title=f"on the {CHOICE:,} that choose the rate")
  stream.set_title(f"MNIST in drifting light, one example at a time, {len(SEEDS)} seeds")
  for axes in (stream, rates):
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
  figure.legend(frameon=False, ncols=4, loc="outside lower center")
  figure.savefig(path, dpi=150, facecolor="white")


def table(results: Sequence[dict[str, Any]]) -> str:
  """Return a Markdown table of the accuracy over the stream: mean and range of the seeds, in %."""
  lines = [
    "| method | rate | all 20,000 examples | the last 5,000 | the 1,000 after the lamp |",
    "| --- | --: | --: | --: | --: |",
  ]
  half = STREAM // 2 // WINDOW
  for result in results:
    windows = 100 * np.array(result["windows"])
    parts = (windows, windows[:, -5_000 // WINDOW :], windows[:, half : half + 1_000 // WINDOW])
    means = (part.mean(axis=1) for part in parts)
    cells = (f"{x.mean():.1f} ({x.min():.1f}–{x.max():.1f})" for x in means)
    lines.append(f"| {result['method']} | {result['rate']:g} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def load(name: str, sha256: str) -> np.ndarray:
  """Return the flat array in an IDX file of MNIST, which is downloaded if it is missing."""
  # The checksum is that of the array, as copies of a file may differ in their compression.
  path = pooch.retrieve(MNIST + name, known_hash=None, fname=name, path=CACHE / "mnist")
  raw = gzip.decompress(pathlib.Path(path).read_bytes())
  array = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])  # After the sizes of raw[3] axes.
  if hashlib.sha256(array).hexdigest() != sha256:
    raise ValueError(f"{path} is not the published file. Remove it and run again to download it.")
  return array


def main() -> None:
  """Run every method, and write the results, the table and the figure."""
  images = load("train-images-idx3-ubyte.gz", IMAGES_SHA256).reshape(-1, 784)
  labels = load("train-labels-idx1-ubyte.gz", LABELS_SHA256).astype(np.int32)
  RESULTS.mkdir(parents=True, exist_ok=True)
  results = []
  for method in METHODS:
    results.append(measure(method, images, labels))
    print(table(results[-1:]).splitlines()[-1], f"{results[-1]['seconds']} s", flush=True)
  (RESULTS / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
  (RESULTS / "online_learning.md").write_text(table(results))
  draw(results, RESULTS / "online_learning.png")


if __name__ == "__main__":
  main()
