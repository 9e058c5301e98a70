"""Augmentation of training images: pure functions of a random key and a batch of images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_IMAGENET_SIZE = 224


def augment_cifar(key: jax.Array, images: jax.Array) -> jax.Array:
  """Shift images by up to four pixels in each direction and mirror them with probability 1/2.

  Each image is padded with four pixels of zeros on each side and cropped at random to its original
  size (He et al., 2016a, Section 4.2). Zero is black on the scale of the paper's images; He et al.
  subtracted the mean image first.

  Args:
    key: The random key.
    images: Images `[batch, height, width, channels]`.

  Returns:
    Images of the same shape and dtype.
  """
  padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
  return _crop_and_flip(key, padded, *images.shape[1:3])


def augment_imagenet(key: jax.Array, images: jax.Array) -> jax.Array:
  """Crop images at random to 224 x 224 pixels and mirror them with probability 1/2.

  This is the augmentation of Krizhevsky et al. (2012, Section 4.1).

  Args:
    key: The random key.
    images: Images `[batch, height, width, channels]`, of 256 x 256 pixels.

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
