"""Readers of the formats in which the data sets are published, without unpickling."""

import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

from bnp_experiments.errors import DataError


def read_idx_pair(
  paths: list[pathlib.Path], count: int, image: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Read a file of images and a file of labels in IDX, the format of MNIST.

  The header is 0, 0, the type (8: unsigned bytes), the rank, and the sizes as big-endian integers.

  Args:
    paths: The files of the images and of the labels, compressed if the name ends in .gz.
    count: The expected number of images.
    image: The expected shape of an image.

  Returns:
    The images and their labels, both uint8.

  Raises:
    DataError: A file does not contain an array of the expected shape.
  """
  images, labels = paths
  return _read_idx(images, (count, *image)), _read_idx(labels, (count,))


def read_cifar10(
  paths: list[pathlib.Path], count: int, image: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Read files of the binary version of CIFAR-10, each with the same number of images.

  A record is a label followed by the colour planes of an image.

  Args:
    paths: The files.
    count: The expected number of images in all files together.
    image: The height, the width and the number of colours.

  Returns:
    The images, NHWC, and their labels, both uint8.

  Raises:
    DataError: A file does not have the expected size.
  """
  return _read_cifar(paths, count, image, label_bytes=1)


def read_cifar100(
  paths: list[pathlib.Path], count: int, image: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Read files of the binary version of CIFAR-100.

  A record is a coarse label and a fine label, followed by the colour planes of an image. Arguments,
  results and errors are those of `read_cifar10`; the labels are the fine ones.
  """
  return _read_cifar(paths, count, image, label_bytes=2)


def _read_idx(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
  raw = _read(path)
  header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
  if not raw.startswith(header):
    raise DataError(
      f"{path} begins with the bytes {raw[: len(header)].hex(' ')}, but an IDX file of shape "
      f"{shape} begins with {header.hex(' ')}. {_remedy(path)}"
    )
  return _as_array(path, raw[len(header) :], shape)


def _read_cifar(
  paths: list[pathlib.Path], count: int, image: tuple[int, ...], label_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
  shape = (count // len(paths), label_bytes + math.prod(image))
  records = np.concatenate([_as_array(path, _read(path), shape) for path in paths])
  height, width, colours = image
  planes = records[:, label_bytes:].reshape(count, colours, height, width)
  return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, label_bytes - 1].copy()


def _read(path: pathlib.Path) -> bytes:
  try:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
  except (OSError, EOFError, zlib.error) as error:
    raise DataError(f"{path} cannot be read ({error}). {_remedy(path)}") from error


def _remedy(path: pathlib.Path) -> str:
  return f"Remove {path} and run again to download it."


def _as_array(path: pathlib.Path, raw: bytes, shape: tuple[int, ...]) -> np.ndarray:
  if len(raw) != math.prod(shape):
    raise DataError(
      f"{path} contains {len(raw)} bytes of data but shape {shape} takes {math.prod(shape)}. It is "
      f"truncated or another file. {_remedy(path)}"
    )
  return np.frombuffer(raw, np.uint8).reshape(shape)
