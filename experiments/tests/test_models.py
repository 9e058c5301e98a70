"""Tests of the networks: published sizes, covered kernels, and outputs of a NumPy reference."""

import functools
import math

from bnp_experiments import models, resnet
from bnp_experiments.models import CNN, MLP
from bnp_experiments.resnet import ResNet, ResNet18
from bnp_experiments.transformers import LanguageModel, ViT
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax
from bnp_optax.normalization import GhostBatchNorm

CIFAR, IMAGENET = (2, 32, 32, 3), (2, 224, 224, 3)
NORMS = {
  "none": None,
  "batch_norm": models.batch_norm,
  "layer_norm": models.layer_norm,
  "group_norm": models.group_norm,
  "batch_renorm": models.batch_renorm,
  "ghost_batch_norm": lambda train: GhostBatchNorm(not train, ghost_size=1, num_groups=4),
  "resnet_batch_norm": resnet.batch_norm,
}


def images(shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 2 else jnp.float32)


def parameters(model, shape):
  init = functools.partial(model.init, train=False)
  return jax.eval_shape(init, jax.random.key(0), images(shape))["params"]


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def resnet_parameters(depth):
  """Count parameters without convolution biases, with a norm per layer (2016a, Section 4.2)."""
  n = (depth - 2) // 6
  convs = [(3, 16)] + [(16, 16)] * 2 * n
  convs += [(16, 32)] + [(32, 32)] * (2 * n - 1) + [(32, 64)] + [(64, 64)] * (2 * n - 1)
  assert len(convs) == depth - 1
  return sum(9 * a * b + 2 * b for a, b in convs) + 64 * 10 + 10


@pytest.mark.parametrize(
  ("model", "shape", "expected"),
  [
    (MLP(), CIFAR, 3072 * 100 + 2 * 100 * 100 + 100 * 10 + 310),
    (CNN(), CIFAR, 9 * (3 * 32 + 32 * 64 + 64 * 32) + 128 + 512 * 64 + 64 + 64 * 10 + 10),
    (ResNet(20, norm=resnet.batch_norm), CIFAR, resnet_parameters(20)),
    (ResNet(110, norm=resnet.batch_norm), CIFAR, resnet_parameters(110)),
    # The number of torchvision.
    (ResNet18(norm=resnet.batch_norm), IMAGENET, 11_689_512),
  ],
  ids=lambda value: getattr(value, "title", None),
)
def test_number_of_parameters(model, shape, expected):
  assert count(parameters(model, shape)) == expected


@pytest.mark.parametrize(
  ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_number_of_parameters_as_published(depth, millions):
  """Compare the numbers of parameters with Table 6 of He et al. (2016a)."""
  digits = 1 if depth == 110 else 2
  assert round(resnet_parameters(depth) / 1e6, digits) == millions


SMALL = {
  "mlp": (MLP((8, 8)), CIFAR),
  "cnn": (CNN((8, 8, 8), 8), CIFAR),
  "resnet": (ResNet(14), (2, 8, 8, 3)),
  "preactivation": (ResNet(14, preactivation=True), (2, 8, 8, 3)),
  "resnet18": (ResNet18(5), (2, 64, 64, 3)),
  "vit": (ViT(blocks=1, width=8, heads=2), (2, 8, 8, 3)),
  "language": (LanguageModel(1, 8, 2, classes=20), (2, 7)),
}


@pytest.mark.parametrize(
  ("name", "norm"),
  [(name, norm) for name in SMALL for norm in ("none", "batch_norm")]
  + [("cnn", norm) for norm in list(NORMS)[2:]],
)
def test_every_kernel_is_covered(name, norm):
  model, shape = SMALL[name]
  model = model.clone(norm=NORMS[norm])
  layers = models.find_layers(model, images(shape), train=True)
  kernels = {
    tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    for path, _ in jax.tree.leaves_with_path(parameters(model, shape))
    if jax.tree_util.keystr(path[-1:], simple=True) == "kernel"
  }
  assert set(layers) == kernels
  assert len(kernels) > 2


@pytest.mark.parametrize("changes", [False, True])
def test_block_starts_as_its_shortcut(changes):
  """Compare a block whose last weights are zero with the shortcut of 2016a, option A."""
  block = resnet.Block(8, nn.Conv, None, stride=1 + changes, zero_init=True)
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4 if changes else 8))
  init_with_output = jax.jit(functools.partial(block.init_with_output, train=True))
  actual, _ = init_with_output(jax.random.key(1), x)
  shortcut = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (0, 4))) if changes else x
  np.testing.assert_array_equal(actual, jnp.maximum(shortcut, 0))


def test_every_block_starts_as_its_shortcut():
  model = ResNet(14, zero_init=True)
  init = jax.jit(functools.partial(model.init, train=True))
  params = init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]
  kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
  assert sum(not np.any(kernel) for kernel in kernels) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_trains_with_bnp(name):
  """Trace one step, in which the statistics of every layer must reach the optimizer."""
  model, shape = SMALL[name]
  layers = models.find_layers(model, images(shape), train=True)
  tx = bnp_optax.scale_by_bnp(layers=layers)

  def step(params, inputs):
    def loss(params):
      with bnp_optax.linen.sow_statistics(example_axes=2 if name == "language" else 1):
        logits, aux = model.apply({"params": params}, inputs, train=True, mutable=["intermediates"])
      return jnp.mean(logits**2), (logits, aux["intermediates"])

    grads, (logits, stats) = jax.grad(loss, has_aux=True)(params)
    return logits, tx.update(grads, tx.init(params), params, stats=stats)[0]

  params = parameters(model, shape)
  logits, updates = jax.eval_shape(step, params, images(shape))
  assert logits.shape == (*(shape if name == "language" else shape[:1]), model.classes)
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def init(model, *inputs):
  variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), *inputs)
  return variables, jax.tree.map(np.asarray, variables["params"])


def forward(model, variables, inputs, *, train=False):
  apply = functools.partial(model.apply, train=train, mutable=["batch_stats"] if train else False)
  outputs = jax.jit(apply)(variables, inputs)
  return outputs[0] if train else outputs


def relu(h):
  return np.maximum(h, 0)


def dense(h, layer):
  return h @ layer["kernel"] + layer["bias"]


def conv(h, layer, *, padding=0, stride=1):
  padded = np.pad(h, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
  outputs = np.einsum("bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], layer["kernel"])
  return outputs + layer.get("bias", 0)


@pytest.mark.parametrize("norm", ["none", "batch_norm"])
def test_cnn_layer_by_layer(norm):
  """Compare with norm(pool(relu(W h + b))), which normalizes the inputs of the next layer."""
  x = np.random.default_rng(0).normal(size=(3, 12, 12, 2)).astype(np.float32)
  model = CNN((4, 5), 6, norm=NORMS[norm])
  variables, params = init(model, x)

  def normalize(h):
    axes = tuple(range(h.ndim - 1))
    return h if norm == "none" else (h - h.mean(axes)) / np.sqrt(h.var(axes) + 1e-3)

  h = normalize(relu(conv(x, params["Conv_0"])).reshape(3, 5, 2, 5, 2, 4).max((2, 4)))
  h = normalize(relu(conv(h, params["Conv_1"]))).reshape(3, -1)
  h = normalize(relu(dense(h, params["Dense_0"])))
  actual = forward(model, variables, x, train=True)
  np.testing.assert_allclose(actual, dense(h, params["Dense_1"]), rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("preactivation", [False, True])
def test_resnet_layer_by_layer(preactivation):
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  model = ResNet(14, preactivation, norm=models.layer_norm)
  variables, params = init(model, x)

  def normalize(h):
    return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-3)

  h = relu(normalize(conv(x, params["Conv_0"], padding=1)))
  for number in range(6):
    block, stride = params[f"Block_{number}"], 2 if number in (2, 4) else 1
    inputs = relu(normalize(h)) if preactivation and number else h
    shortcut = inputs if stride == 2 else h
    inner = relu(normalize(conv(inputs, block["Conv_0"], padding=1, stride=stride)))
    h = conv(inner, block["Conv_1"], padding=1)
    grown = [(0, 0)] * 3 + [(0, h.shape[-1] - shortcut.shape[-1])]
    shortcut = np.pad(shortcut[:, ::stride, ::stride], grown)
    h = h + shortcut if preactivation else relu(normalize(h) + shortcut)
  h = relu(normalize(h)) if preactivation else h
  expected = dense(h.mean((1, 2)), params["Dense_0"])
  np.testing.assert_allclose(forward(model, variables, x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_initial_weights_and_biases():
  x = np.zeros((1, 8, 8, 3), np.float32)
  plain = init(ResNet(8, norm=models.group_norm), x)[1]
  scaled = init(ResNet(8, norm=models.group_norm, init_scale=0.1, use_bias=True), x)[1]
  kernel = plain["Block_2"]["Conv_1"]["kernel"]
  assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
  np.testing.assert_allclose(scaled["Block_2"]["Conv_1"]["kernel"], 0.1 * kernel, rtol=1e-5)
  assert set(plain["Conv_0"]) == {"kernel"}
  assert set(scaled["Conv_0"]) == {"kernel", "bias"}


def test_wrong_depth_is_refused():
  with pytest.raises(ValueError, match="has 6n \\+ 2 layers, not 18"):
    parameters(ResNet(18), CIFAR)


def test_group_norm_counts_groups_or_channels():
  by_size = functools.partial(models.group_norm, num_groups=None, group_size=4)
  assert models.group_norm(True).num_groups == 4
  x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
  actual = jax.jit(by_size(True).init_with_output)(jax.random.key(0), x)[0]
  groups = np.asarray(x, np.float64).reshape(2, 3, 2, 4)
  centred = groups - groups.mean((1, 3), keepdims=True)
  expected = centred / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
  np.testing.assert_allclose(actual, expected.reshape(x.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [CNN((4, 4), 4), ViT(blocks=1, width=8, heads=2)])
def test_grey_images_have_one_channel(model):
  assert parameters(model, (2, 12, 12)) == parameters(model, (2, 12, 12, 1))


@pytest.mark.slow
def test_language_model_does_not_look_ahead():
  model = LanguageModel(2, 8, 2, classes=5)
  tokens = np.array([[0, 1, 2, 3, 4], [0, 1, 2, 4, 3], [4, 1, 2, 3, 4]], np.int32)
  variables, _ = init(model, tokens)
  logits = forward(model, variables, tokens)
  np.testing.assert_array_equal(logits[0, :3], logits[1, :3])
  assert np.abs(logits[0, 3] - logits[1, 3]).max() > 1e-3
  # Earlier tokens count: these two sequences differ in their first token alone.
  assert np.abs(logits[0, 4] - logits[2, 4]).max() > 1e-4


def test_titles():
  titles = [model.title for model, _ in SMALL.values()]
  assert titles == [
    "FC 8-8",
    "CNN 8-8-8, FC 8",
    "ResNet-14",
    "preactivation ResNet-14",
    "ResNet-18",
    "ViT 1 x 8, patch 4",
    "language model 1 x 8",
  ]
