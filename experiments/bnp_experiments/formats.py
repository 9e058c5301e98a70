"""The file formats that the data sets are published in; nothing is unpickled."""

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
  """Reads a file of images and a file of labels in IDX, the format of MNIST.

  The header is 0, 0, the type (8: unsigned bytes), the rank, and the sizes as big-endian integers.

  Args:
    paths: The images and the labels; compressed if the name ends in .gz.
    count: How many images there must be.
    image: The shape of one.

  Returns:
    The images and their labels, both uint8.

  Raises:
    DataError: A file is not such an array.
  """
  images, labels = paths
  return _read_idx(images, (count, *image)), _read_idx(labels, (count,))


def read_cifar10(
  paths: list[pathlib.Path], count: int, image: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Reads files of CIFAR-10's binary version, which all have the same number of images.

  A record is a label and then the colour planes of an image.

  Args:
    paths: The files.
    count: How many images there must be in all of them.
    image: Height, width and number of colours.

  Returns:
    The images, NHWC, and their labels, both uint8.

  Raises:
    DataError: A file does not have its size.
  """
  return _read_cifar(paths, count, image, label_bytes=1)


def read_cifar100(
  paths: list[pathlib.Path], count: int, image: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Like `read_cifar10`, for records that begin with the coarse label and then the fine one."""
  return _read_cifar(paths, count, image, label_bytes=2)


def _read_idx(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
  raw = _read(path)
  header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
  if not raw.startswith(header):
    raise DataError(
      f"{path}: begins with the bytes {raw[: len(header)].hex(' ')}, but an IDX file of shape "
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
    raise DataError(f"{path}: cannot be read ({error}). {_remedy(path)}") from error


def _remedy(path: pathlib.Path) -> str:
  return f"Remove {path} and run again to fetch it anew."


def _as_array(path: pathlib.Path, raw: bytes, shape: tuple[int, ...]) -> np.ndarray:
  if len(raw) != math.prod(shape):
    raise DataError(
      f"{path}: holds {len(raw)} bytes of data, but shape {shape} takes {math.prod(shape)}: it is "
      f"truncated, or another file. {_remedy(path)}"
    )
  return np.frombuffer(raw, np.uint8).reshape(shape)
