"""Random networks, options and inputs: no error, no state that is not finite, the paper's step.

A network is compiled once for many cases. Everything else that is random is an argument of the
compiled program, including the number of examples (by a mask) and BNP's own options.

By hand, 10,000 cases in some five minutes:
pytest tests/test_fuzz.py --hypothesis-profile=thorough --hypothesis-seed=0
"""

import dataclasses
import functools
import math

import chex
import flax.linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax
from tests import unrolled
from tests.unrolled import Entry

THOROUGH = settings.default.max_examples >= 500
# To compile a network takes far longer than a case. These two have every kind of layer; the second
# one has a strided convolution.
CASES, NETWORKS = (10_000, range(50)) if THOROUGH else (100, (0, 4))
EXAMPLES, SIZE, CHANNELS = 3, 3, 2

FAULTS = ("nan", "inf", "-inf", "1e30", "-1e30", "1e-30", "1e-40", "constant", "all constant")
# After these the step is still the paper's; the square of 1e30 is too large for float32.
HARMLESS = ("1e-30", "1e-40", "constant", "all constant")


@dataclasses.dataclass(frozen=True)
class Block:
  kind: str
  features: int
  groups: int
  bias: bool
  window: int
  stride: int


class Scanned(nn.Module):
  """A layer of a stack."""

  bias: bool
  dtype: str

  @nn.compact
  def __call__(self, h, _):
    self.sow("intermediates", "h", h)
    kwargs = {"use_bias": self.bias, "dtype": self.dtype, "param_dtype": self.dtype}
    return nn.tanh(nn.Dense(h.shape[-1], name="dense", **kwargs)(h)), None


class Network(nn.Module):
  """Blocks after each other, and a dense head; all inputs of layers are sown too."""

  blocks: tuple
  dtype: str

  @nn.compact
  def __call__(self, h):
    for i, block in enumerate(self.blocks):
      name = f"layer_{i}"
      kwargs = {"use_bias": block.bias, "dtype": self.dtype, "param_dtype": self.dtype}
      if block.kind == "scan":
        stack = nn.scan(
          Scanned,
          variable_axes={"params": 0, "intermediates": 0},
          split_rngs={"params": True},
          length=2,
        )
        h, _ = stack(block.bias, self.dtype, name=name)(h, None)
        continue
      self.sow("intermediates", f"h_{i}", h)
      if block.kind == "dense":
        layer = nn.Dense(block.features, name=name, **kwargs)
      else:
        layer = nn.Conv(
          block.features,
          (block.window, block.window),
          strides=block.stride,
          feature_group_count=block.groups,
          name=name,
          **kwargs,
        )
      h = nn.tanh(layer(h))
    h = h.reshape(len(h), -1)
    self.sow("intermediates", "h_head", h)
    return nn.Dense(2, name="head", dtype=self.dtype, param_dtype=self.dtype)(h)


def random_blocks(seed):
  rng = np.random.default_rng(seed)
  channels, blocks = CHANNELS, []
  for _ in range(rng.integers(1, 4)):
    groups = rng.choice([g for g in (1, 2, 3) if channels % g == 0])
    kind = rng.choice(["dense", "conv", "conv", "scan"])
    features = channels if kind == "scan" else groups * rng.integers(1, 4 // groups + 1)
    block = (features, groups, rng.random() < 0.7, rng.integers(1, 4), rng.integers(1, 3))
    blocks.append(Block(str(kind), *(x.item() if hasattr(x, "item") else x for x in block)))
    channels = features
  return tuple(blocks)


@functools.cache
def make(seed, dtype):
  """Return the blocks, the shapes of the parameters, `init` and the program of one step."""
  model = Network(random_blocks(seed), dtype)
  example = jnp.zeros((EXAMPLES, SIZE, SIZE, CHANNELS), dtype)
  layers = bnp_optax.linen.layers(model, example, strict=True)
  shapes = jax.eval_shape(model.init, jax.random.key(0), example)["params"]

  def loss_fn(params, x, y, mask):
    with bnp_optax.linen.sow_statistics(mask=mask):
      out, aux = model.apply({"params": params}, x, mutable=["intermediates"])
    losses = jnp.where(mask, jnp.sum((out - y) ** 2, axis=-1), 0)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(mask, dtype=dtype), 1), aux["intermediates"]

  @jax.jit
  def step(params, state, x, y, mask, options):
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, x, y, mask)
    updates, new_state = bnp_optax.scale_by_bnp(*options, layers=layers, debias=False).update(
      grads, state, stats=stats
    )
    sgd = bnp_optax.bnp(optax.sgd(1.0), *options, layers=layers, debias=False)
    inner_state = sgd.init(params).inner_state
    same, _ = sgd.update(grads, bnp_optax.BnpState(state, inner_state), params, stats=stats)
    return grads, updates, jax.tree.map(jnp.negative, same), new_state, inputs_of_layers(stats)

  init = bnp_optax.scale_by_bnp(layers=layers, debias=False).init
  return model.blocks, shapes, jax.jit(init), step


def inputs_of_layers(intermediates):
  """Return the values that the networks above sow."""
  named = {name: value[0] for name, value in intermediates.items() if name.startswith("h_")}
  return named | {name: value["h"][0] for name, value in intermediates.items() if "h" in value}


def make_entries(blocks, inputs, valid):
  """Return the linear maps of a network, for the examples that count."""
  entries = []
  for i, block in enumerate(blocks):
    name = f"layer_{i}"
    if block.kind == "scan":
      for depth, h in enumerate(inputs[name]):
        positions = math.prod(h.shape[1:-1])
        entries.append(Entry((name, "dense"), h[:valid], positions, index=(depth,)))
      continue
    h = inputs[f"h_{i}"][:valid]
    if block.kind == "dense":
      entries.append(Entry((name,), h, math.prod(h.shape[1:-1])))
      continue
    positions = math.prod(-(-size // block.stride) for size in h.shape[1:-1])
    for group in range(block.groups):
      pick = lambda n, group=group: slice(group * n, (group + 1) * n)
      part = h[..., pick(h.shape[-1] // block.groups)]
      outputs = pick(block.features // block.groups)
      entries.append(Entry((name,), part, positions, window=2, outputs=outputs))
  return [*entries, Entry(("head",), inputs["h_head"][:valid])]


@st.composite
def cases(draw):
  decay = draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.9999]) | st.floats(0.5, 0.999))
  # With neither a memory nor an epsilon, a feature without variance is divided by zero.
  smallest = 0.0 if decay else 1e-4
  return {
    "network": draw(st.sampled_from(NETWORKS)),
    "dtype": draw(st.sampled_from(["float32", "float64"])),
    "options": (
      decay,
      draw(st.sampled_from([0.0, 1e-2]) | st.floats(0.0, 1.0)),
      draw(st.sampled_from([smallest, 1e-4]) | st.floats(1e-4, 1.0)),
    ),
    "seed": draw(st.integers(0, 2**32 - 1)),
    "valid": draw(st.lists(st.sampled_from([3, 3, 2, 1, 0]), min_size=1, max_size=3)),
    "mean": draw(st.sampled_from([0.0, 0.1, 1.0, 30.0])),
    "deviation": 10.0 ** draw(st.integers(-3, 2)),
    "fault": draw(st.none() | st.none() | st.sampled_from(FAULTS)),
    "fault_at": draw(st.integers(0, 2)),
  }


def put_fault(fault, x, rng):
  if fault == "all constant":
    return np.full_like(x, rng.normal())
  if fault == "constant":
    x[..., rng.integers(CHANNELS)] = rng.normal()
    return x
  x[0, rng.integers(SIZE), rng.integers(SIZE), rng.integers(CHANNELS)] = float(fault)
  return x


def check(case):
  blocks, shapes, init, step = make(case["network"], case["dtype"])
  rng = np.random.default_rng(case["seed"])
  params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), shapes)
  state, oracle_state, expected_nonfinite, agrees = init(params), {}, 0, True
  options = tuple(np.float64(x) for x in case["options"])

  for number, valid in enumerate(case["valid"]):
    x = case["deviation"] * (case["mean"] + rng.normal(size=(EXAMPLES, SIZE, SIZE, CHANNELS)))
    x[valid:] = 1e3
    x = x.astype(case["dtype"])
    fault = case["fault"] if number == case["fault_at"] else None
    if fault:
      x = put_fault(fault, x, rng)
    # A fault ends the comparison unless it is harmless.
    agrees &= fault in (None, *HARMLESS)
    y = rng.normal(size=(EXAMPLES, 2)).astype(case["dtype"])
    mask = np.arange(EXAMPLES) < valid
    before = state
    grads, updates, same, state, inputs = jax.device_get(step(params, state, x, y, mask, options))
    chex.assert_tree_all_finite(state)
    assert all((x >= 0).all() for x in jax.tree.leaves(state.input_variance))
    assert state.count == number + 1
    if not agrees:
      assert state.nonfinite_count >= before.nonfinite_count
      continue

    chex.assert_tree_all_finite((updates, same))
    if valid:
      grads = jax.tree.map(np.float64, grads)
      entries = make_entries(blocks, inputs, valid)
      hyperparameters = dict(zip(("rho", "eps_1", "eps_2"), map(float, options), strict=True))
      expected = unrolled.step(entries, grads, oracle_state, **hyperparameters)
      bound = rounding(entries, grads, oracle_state, hyperparameters, case["dtype"])
      for actual in (updates, same):
        check_layers(actual, expected, bound)
    else:
      # Without rows the statistics stay the same, and are counted.
      expected_nonfinite += sum(2 if block.kind == "scan" else 1 for block in blocks) + 1
      chex.assert_trees_all_equal(state.input_mean, before.input_mean)
      chex.assert_trees_all_equal(state.input_variance, before.input_variance)
      assert optax.tree.norm(updates) == 0
    assert state.nonfinite_count == expected_nonfinite


def rounding(entries, grads, statistics, hyperparameters, dtype):
  """Return a bound on the rounding of each number of a step.

  It is the step again with every term positive, so that nothing cancels; the error of a mean
  is proportional to the size of the inputs.
  """
  large = {k: (-np.abs(mu) - np.sqrt(sigma2), sigma2) for k, (mu, sigma2) in statistics.items()}
  limits = np.finfo(dtype)
  # A gradient below the smallest normal number may be taken for 0.
  absolute = jax.tree.map(lambda g: np.abs(g) + limits.tiny / limits.eps, grads)
  # A decay of 1 keeps the statistics as they are.
  step = unrolled.step(entries, absolute, large, **{**hyperparameters, "rho": 1.0})
  return jax.tree.map(lambda x: 100 * limits.eps * np.abs(x), step)


def check_layers(updates, expected, bound):
  for path, right in expected.items():
    layer = unrolled.get(updates, path[:-1])
    for name, x, tolerance in zip((path[-1], "bias"), right, bound[path], strict=True):
      if x is not None:
        assert np.all(np.abs(layer[name].astype(np.float64) - x) <= tolerance), (path, name)


@settings(max_examples=CASES)
@given(case=cases())
def test_random_networks_options_and_inputs(case):
  with jax.enable_x64(True), np.errstate(over="ignore", under="ignore"):
    check(case)
