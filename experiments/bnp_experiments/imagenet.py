"""ImageNet (ILSVRC 2012), read during training because it does not fit into memory.

Its files cannot be downloaded without an account. They are expected in the usual layout, one folder
per class, in `$BNP_OPTAX_DATA/imagenet` or `~/.cache/bnp_optax/imagenet`:

    train/n01440764/*.JPEG, ...      1,281,167 images in 1,000 folders
    val/n01440764/*.JPEG, ...        50,000 images in the same folders
"""

import concurrent.futures
import os
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from bnp_experiments.errors import DataError

CLASSES = 1000
_SIZE, _TEST_SIZE = 256, 224
_THREADS = concurrent.futures.ThreadPoolExecutor(os.cpu_count())


class ImageFiles:
  """Images in files, with the interface of an array `[images, size, size, 3]` of uint8.

  Indexing reads images from their files; `take` selects images without reading them.
  """

  def __init__(self, paths: np.ndarray, size: int) -> None:
    """Store the paths and the size.

    Args:
      paths: The files.
      size: Height and width of the central crop of each image, after its shorter side has been
        scaled to 256.
    """
    self._paths = paths
    self._size = size

  def __len__(self) -> int:
    """Return the number of images."""
    return len(self._paths)

  def __getitem__(self, indices: np.ndarray | slice) -> np.ndarray:
    """Read images.

    Args:
      indices: The indices of the images.

    Returns:
      Images `[indices, size, size, 3]`, uint8.

    Raises:
      DataError: A file cannot be read as an image.
    """
    images = list(_THREADS.map(self._read, self._paths[indices]))
    return np.stack(images) if images else np.empty((0, self._size, self._size, 3), np.uint8)

  def take(self, indices: np.ndarray, axis: int) -> "ImageFiles":
    """Select images without reading them; `axis` must be 0."""
    assert axis == 0
    return ImageFiles(self._paths[indices], self._size)

  def _read(self, path: str) -> np.ndarray:
    try:
      with Image.open(path) as image:
        scale = _SIZE / min(image.size)
        scaled = image.convert("RGB").resize([max(_SIZE, round(scale * x)) for x in image.size])
    except (OSError, UnidentifiedImageError) as error:
      raise DataError(f"{path} cannot be read as an image ({error}). Unpack it again.") from error
    left, top = ((side - self._size) // 2 for side in scaled.size)
    return np.asarray(scaled.crop((left, top, left + self._size, top + self._size)))


def read(folder: pathlib.Path) -> tuple[ImageFiles, np.ndarray, ImageFiles, np.ndarray]:
  """List the images and their labels.

  Args:
    folder: The folder that contains `train` and `val`.

  Returns:
    Training images (256 x 256, to be cropped at random) and labels, test images (224 x 224) and
    labels. The classes are numbered in the order of their names.

  Raises:
    DataError: A folder is missing, or there are not 1,000 classes with images in each.
  """
  train, train_labels, names = _list(folder / "train")
  test, test_labels, test_names = _list(folder / "val")
  if names != test_names:
    raise DataError(f"{folder}: train and val have different classes. Unpack them again.")
  return ImageFiles(train, _SIZE), train_labels, ImageFiles(test, _TEST_SIZE), test_labels


def _list(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
  if not folder.is_dir():
    raise DataError(
      f"{folder} is missing. ImageNet cannot be downloaded without an account: get it from "
      f"https://image-net.org and put one folder per class there, or set BNP_OPTAX_DATA to a "
      f"folder that contains imagenet/{folder.name}."
    )
  names = sorted(path.name for path in folder.iterdir() if path.is_dir())
  files = [sorted(map(str, (folder / name).glob("*.JPEG"))) for name in names]
  if len(names) != CLASSES or not all(files):
    empty = sum(not paths for paths in files)
    raise DataError(
      f"{folder} has {len(names)} classes, {empty} of them without a .JPEG file; expected "
      f"{CLASSES} classes. Unpack it again."
    )
  labels = np.repeat(np.arange(CLASSES), [len(paths) for paths in files]).astype(np.uint16)
  return np.concatenate([np.array(paths) for paths in files]), labels, names
