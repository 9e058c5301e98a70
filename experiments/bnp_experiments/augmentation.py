"""How training images are varied: pure functions of a random key and a batch of images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_IMAGENET_SIZE = 224


def augment_cifar(key: jax.Array, images: jax.Array) -> jax.Array:
  """Shifts images by up to four pixels each way, and mirrors every other one.

  Four rows and columns of zeros are added on each side, of which a part of the original size is cut
  out; it is mirrored with probability 1/2 (He et al., 2016a, Section 4.2). Zero is black, on the
  scale on which the paper's images are; He et al. had subtracted the mean image.

  Args:
    key: The random key.
    images: `[batch, height, width, channels]`.

  Returns:
    Images of the same shape and dtype.
  """
  padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
  return _crop_and_flip(key, padded, *images.shape[1:3])


def augment_imagenet(key: jax.Array, images: jax.Array) -> jax.Array:
  """Cuts out any 224 x 224 pixels, and mirrors every other image (Krizhevsky et al., 2012, 4.1).

  Args:
    key: The random key.
    images: `[batch, height, width, channels]`, of 256 x 256 pixels.

  Returns:
    Images `[batch, 224, 224, channels]` of the same dtype.
  """
  return _crop_and_flip(key, images, _IMAGENET_SIZE, _IMAGENET_SIZE)


AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "cifar": augment_cifar,
  "imagenet": augment_imagenet,
}
"""The augmentations by name."""


def _crop_and_flip(key: jax.Array, images: jax.Array, height: int, width: int) -> jax.Array:
  batch, *size, channels = images.shape
  top_key, left_key, flip_key = jax.random.split(key, 3)
  top = jax.random.randint(top_key, (batch,), 0, size[0] - height + 1)
  left = jax.random.randint(left_key, (batch,), 0, size[1] - width + 1)
  flip = jax.random.bernoulli(flip_key, shape=(batch,))

  def crop(image: jax.Array, top: jax.Array, left: jax.Array, flip: jax.Array) -> jax.Array:
    part = jax.lax.dynamic_slice(image, (top, left, 0), (height, width, channels))
    return jnp.where(flip, part[:, ::-1], part)

  return jax.vmap(crop)(images, top, left, flip)
