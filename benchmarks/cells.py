"""The networks, optimizers and training steps that `accelerator.py` and `ahead.py` compare."""

from collections.abc import Callable
import contextlib
import functools
from typing import Any, NamedTuple
from unittest import mock

from common import FullyConnected
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from optax import contrib

import bnp_optax
from bnp_optax import _preconditioner
from bnp_optax._preconditioner import Preconditioner

RATE = 1e-3


class ConvolutionalNetwork(nn.Module):
  """The paper's convolutional network: 32-64-32 filters of 3 x 3, and 64 hidden units.

  Attributes:
    batch_norm: Whether BatchNorm follows each ReLU.
    dtype: Dtype of the activations.
  """

  batch_norm: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """Return the logits of a batch of images."""
    norm = _norm(self.batch_norm, self.dtype)
    for number, filters in enumerate((32, 64, 32)):
      h = nn.relu(nn.Conv(filters, (3, 3), padding="VALID", dtype=self.dtype)(h))
      h = norm(h if number == 2 else nn.max_pool(h, (2, 2), (2, 2)))
    h = norm(nn.relu(nn.Dense(64, dtype=self.dtype)(h.reshape(len(h), -1))))
    return nn.Dense(10, dtype=self.dtype)(h).astype(jnp.float32)


class ResNet(nn.Module):
  """A ResNet for ImageNet. Convolutions have biases in the network without BatchNorm.

  Attributes:
    blocks: Number of blocks of each stage.
    bottleneck: Whether a block has convolutions of 1 x 1, 3 x 3 and 1 x 1, with four times as many
      filters in the last one, and not two of 3 x 3.
    batch_norm: Whether BatchNorm follows each convolution.
    dtype: Dtype of the activations.
  """

  blocks: tuple[int, ...]
  bottleneck: bool = False
  batch_norm: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """Return the logits of a batch of images."""
    norm = _norm(self.batch_norm, self.dtype)
    conv = functools.partial(nn.Conv, use_bias=not self.batch_norm, dtype=self.dtype)
    h = nn.relu(norm(conv(64, (7, 7), 2)(h)))
    h = nn.max_pool(h, (3, 3), (2, 2), "SAME")
    for stage, blocks in enumerate(self.blocks):
      filters = 64 * 2**stage
      outputs = 4 * filters if self.bottleneck else filters
      for number in range(blocks):
        stride = 2 if stage and not number else 1
        same = stride == 1 and h.shape[-1] == outputs
        x = h if same else norm(conv(outputs, (1, 1), stride)(h))
        if self.bottleneck:
          h = nn.relu(norm(conv(filters, (1, 1))(h)))
        h = nn.relu(norm(conv(filters, (3, 3), stride)(h)))
        h = nn.relu(x + norm(conv(outputs, (1, 1) if self.bottleneck else (3, 3))(h)))
    return nn.Dense(1000, dtype=self.dtype)(h.mean((1, 2))).astype(jnp.float32)


class TransformerBlock(nn.Module):
  """A block of GPT-2 or of ViT: attention with 12 heads and a hidden layer, both after LayerNorm.

  Attributes:
    causal: Whether a token attends to itself and those before it alone.
    dtype: Dtype of the activations.
  """

  causal: bool
  dtype: Any

  @nn.compact
  def __call__(self, h: jax.Array, _: None) -> tuple[jax.Array, None]:
    """Return the outputs of the block."""
    width = h.shape[-1]
    x = nn.LayerNorm(dtype=self.dtype)(h)
    x = nn.Dense(3 * width, dtype=self.dtype)(x).reshape(*h.shape[:2], 3, 12, width // 12)
    query, key, value = jnp.moveaxis(x, 2, 0)
    x = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal, implementation="xla")
    h = h + nn.Dense(width, dtype=self.dtype)(x.reshape(h.shape))
    x = nn.Dense(4 * width, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(h))
    return h + nn.Dense(width, dtype=self.dtype)(nn.gelu(x)), None


class Gpt2(nn.Module):
  """A GPT-2 with its blocks in one loop, recomputed in the backward pass.

  Attributes:
    depth: Number of blocks.
    width: Width of the residual stream.
    vocabulary: Number of tokens.
    dtype: Dtype of the activations.
  """

  depth: int = 12
  width: int = 768
  vocabulary: int = 50257
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Return the logits of each next token."""
    h = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(tokens)
    h = h + nn.Embed(tokens.shape[1], self.width, dtype=self.dtype)(jnp.arange(tokens.shape[1]))
    h = _blocks(self.depth, causal=True, dtype=self.dtype)(h)
    return nn.Dense(self.vocabulary, dtype=self.dtype)(h).astype(jnp.float32)


class Vit(nn.Module):
  """A vision transformer with its blocks in one loop, recomputed in the backward pass.

  Attributes:
    depth: Number of blocks.
    width: Width of the residual stream.
    dtype: Dtype of the activations.
  """

  depth: int = 12
  width: int = 768
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Return the logits of a batch of images."""
    h = nn.Conv(self.width, (16, 16), 16, dtype=self.dtype)(images)
    h = h.reshape(len(h), -1, self.width)
    h = h + nn.Embed(h.shape[1], self.width, dtype=self.dtype)(jnp.arange(h.shape[1]))
    h = _blocks(self.depth, causal=False, dtype=self.dtype)(h)
    return nn.Dense(1000, dtype=self.dtype)(h.mean(axis=1)).astype(jnp.float32)


def _blocks(depth: int, *, causal: bool, dtype: Any) -> Callable[[jax.Array], jax.Array]:
  blocks = nn.scan(
    nn.remat(TransformerBlock, prevent_cse=False),
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    length=depth,
  )
  return lambda h: nn.LayerNorm(dtype=dtype)(blocks(causal, dtype)(h, None)[0])


def _norm(batch_norm: bool, dtype: Any) -> Callable[[jax.Array], jax.Array]:
  def norm(h: jax.Array) -> jax.Array:
    return nn.BatchNorm(use_running_average=False, dtype=dtype)(h) if batch_norm else h

  return norm


class Cell(NamedTuple):
  """A network with a batch of given shape.

  Attributes:
    model: Function that returns the network, given whether it has BatchNorm.
    inputs: Shape and dtype of the inputs.
    labels: Shape and dtype of the labels, of which the loss is a mean.
    methods: The methods to compare.
  """

  model: Callable[[bool], nn.Module]
  inputs: jax.ShapeDtypeStruct
  labels: jax.ShapeDtypeStruct
  methods: tuple[str, ...]


_RESNETS = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}


def make_cell(name: str) -> Cell:
  """Return the cell of a name ``network:batch:dtype``, for example ``fc4096-4096:60:f32``."""
  network, batch, dtype_name = name.split(":")
  dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[dtype_name]
  methods = [*METHODS]
  shape, labels = (int(batch),), jax.ShapeDtypeStruct((int(batch),), jnp.int32)
  if network.startswith("gpt2"):
    depth, width, vocabulary = (12, 768, 50257) if network == "gpt2" else (1, 48, 100)
    tokens = jax.ShapeDtypeStruct((*shape, 1024 if network == "gpt2" else 16), jnp.int32)
    methods.remove("BatchNorm")
    return Cell(lambda _: Gpt2(depth, width, vocabulary, dtype), tokens, tokens, tuple(methods))
  if network.startswith("fc"):
    widths = tuple(map(int, network.removeprefix("fc").split("-")))
    shape, model = (*shape, 3072), functools.partial(FullyConnected, widths, dtype=dtype)
  elif network == "cnn":
    shape, model = (*shape, 32, 32, 3), functools.partial(ConvolutionalNetwork, dtype=dtype)
  elif network == "vit-b":
    methods.remove("BatchNorm")
    # 256 patches. For the 196 of 224 x 224, XLA's compiler for GPU finds no tiling.
    shape, model = (*shape, 256, 256, 3), lambda batch_norm: Vit(dtype=dtype)
  else:
    # Muon orthogonalizes no kernel of a ResNet but the last.
    methods.remove("Muon")
    blocks, bottleneck = _RESNETS[network]
    shape = (*shape, 224, 224, 3)
    model = functools.partial(ResNet, blocks, bottleneck, dtype=dtype)
  return Cell(
    lambda batch_norm: model(batch_norm=batch_norm),
    jax.ShapeDtypeStruct(shape, jnp.float32),
    labels,
    tuple(methods),
  )


_NETWORK_NAMES = {
  "cnn": "CNN",
  "resnet18": "ResNet-18",
  "resnet50": "ResNet-50",
  "vit-b": "ViT-B",
  "gpt2": "GPT-2 small",
}


def describe(name: str) -> str:
  """Return the network and batch size of a cell for a table."""
  network, batch, _ = name.split(":")
  return f"{_NETWORK_NAMES.get(network, network.replace('fc', 'FC '))}, {batch}"


def _matrices(params: optax.Params) -> Any:
  """Return the axes of the matrices for Muon: those of dense layers, scanned or not."""
  axes = {2: contrib.MuonDimensionNumbers(0, 1), 3: contrib.MuonDimensionNumbers(1, 2)}
  return jax.tree.map(lambda x: axes.get(x.ndim), params)


def _bnp(layers: Any) -> optax.GradientTransformation:
  return optax.chain(bnp_optax.scale_by_bnp(layers=layers), optax.sgd(RATE))


def _bnp_adam(layers: Any) -> optax.GradientTransformation:
  return bnp_optax.bnp(optax.adam(RATE), layers=layers)


METHODS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
  "SGD": lambda layers: optax.sgd(RATE),
  "BatchNorm": lambda layers: optax.sgd(RATE),
  "BNP": _bnp,
  "Adam": lambda layers: optax.adam(RATE),
  "bnp(Adam)": _bnp_adam,
  "Muon": lambda layers: contrib.muon(RATE, muon_weight_dimension_numbers=_matrices),
}

# Alternative forms of step 5. Each replaces functions of the library.


def _terms(v: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return a vector as ``[stack, inputs, 1]`` and a kernel as ``[stack, inputs, output]``."""
  column = jnp.broadcast_to(v, w.shape[:-1]).reshape(len(w), -1, 1)
  return column, w.reshape(len(w), -1, w.shape[-1])


def _product(v: jax.Array, w: jax.Array) -> jax.Array:
  """Compute the sum of step 5 as a product of matrices."""
  column, matrix = _terms(v, w)
  return jnp.einsum("sko,skp->sp", column, matrix, precision=jax.lax.Precision.HIGHEST)


def _reduction(v: jax.Array, w: jax.Array) -> jax.Array:
  """Compute the sum of step 5 as a reduction, which can be fused with what computes ``w``."""
  column, matrix = _terms(v, w)
  return jnp.sum(column * matrix, 1)


def _steps(p: Preconditioner, g_w: jax.Array, g_b: jax.Array) -> tuple[jax.Array, ...]:
  """Return the new ``G_w``, and what the forms below compute the new ``G_b`` from."""
  scale = 1 / (p.sigma * p.q) ** 2
  s, g = _terms(scale, g_w)
  v, _ = _terms(p.mu * scale, g_w)
  mu, _ = _terms(p.mu, g_w)
  return (s * g - v * g_b[:, None]).reshape(g_w.shape), g, v, mu, g_b / p.q[..., 0] ** 2


def _centred(p: Preconditioner, g_w: jax.Array, g_b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Compute ``sum v (g_w - mu g_b)`` from the gradient: no array between steps 4 and 5."""
  G_w, g, v, mu, G_b = _steps(p, g_w, g_b)
  return G_w, G_b - jnp.sum(v * (g - mu * g_b[:, None]), 1)


def _pairs(p: Preconditioner, g_w: jax.Array, g_b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Compute the same sum as the reduction of two arrays, each with fewer operands."""
  G_w, g, v, mu, G_b = _steps(p, g_w, g_b)

  def add(a: Any, b: Any) -> Any:
    return (a[0] + a[1]) + (b[0] + b[1]), jnp.zeros_like(a[1])

  zero = jnp.zeros([], g.dtype)
  terms = v * g, jnp.broadcast_to(-(v * mu) * g_b[:, None], g.shape)
  return G_w, G_b - jax.lax.reduce(terms, (zero, zero), add, (1,))[0]


def _two_sums(p: Preconditioner, g_w: jax.Array, g_b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Compute ``sum v g_w - (sum v mu) g_b``, which cancels where means are large."""
  G_w, g, v, mu, G_b = _steps(p, g_w, g_b)
  return G_w, G_b - (jnp.sum(v * g, 1) - jnp.sum(v * mu, 1) * g_b)


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
  "BNP: product": ("BNP", {"_sum": _product}),
  "BNP: reduction": ("BNP", {"_sum": _reduction}),
  "BNP: centred": ("BNP", {"precondition": _centred}),
  "BNP: pairs": ("BNP", {"precondition": _pairs}),
  "BNP: two sums": ("BNP", {"precondition": _two_sums}),
  "bnp(Adam): product": ("bnp(Adam)", {"_sum": _product}),
  "bnp(Adam): reduction": ("bnp(Adam)", {"_sum": _reduction}),
}

CELLS_WITH_FORMS = ("fc4096-4096:60:f32", "fc100-100:60:f32")

Carry = tuple[optax.Params, Any, optax.OptState]


class Step(NamedTuple):
  """A training step of one method.

  Attributes:
    init: Function from a key to parameters, BatchNorm's averages and optimizer state.
    take: Function from these three and a batch to the next three.
  """

  init: Callable[[jax.Array], Carry]
  take: Callable[[Carry, tuple[jax.Array, jax.Array]], Carry]


def make_step(cell: Cell, method: str) -> Step:
  """Return the training step of a method, or of a form of step 5, for a cell."""
  method, replaced = FORMS.get(method, (method, {}))
  model, examples = cell.model(method == "BatchNorm"), cell.labels.ndim
  layers = bnp_optax.linen.layers(model, cell.inputs) if "bnp" in method.lower() else None
  tx = optax.with_extra_args_support(METHODS[method](layers))

  def loss_fn(params: optax.Params, averages: Any, batch: Any) -> tuple[jax.Array, Any]:
    with contextlib.ExitStack() as stack:
      if layers is not None:
        stack.enter_context(bnp_optax.linen.sow_statistics(example_axes=examples))
      variables = {"params": params, "batch_stats": averages}
      logits, aux = model.apply(variables, batch[0], mutable=["intermediates", "batch_stats"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
    return loss, (aux.get("intermediates"), aux.get("batch_stats", {}))

  def init(key: jax.Array) -> Carry:
    variables = model.init(key, jnp.zeros(cell.inputs.shape, cell.inputs.dtype))
    return variables["params"], variables.get("batch_stats", {}), tx.init(variables["params"])

  def take(carry: Carry, batch: tuple[jax.Array, jax.Array]) -> Carry:
    params, averages, state = carry
    with mock.patch.multiple(_preconditioner, **replaced) if replaced else contextlib.nullcontext():
      grads, (stats, averages) = jax.grad(loss_fn, has_aux=True)(params, averages, batch)
      updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), averages, state

  return Step(init, take)
