"""The data sets, read from their canonical files and verified.

The files lie in `$BNP_OPTAX_DATA`, or in `~/.cache/bnp_optax` if the variable is not set:

    mnist/, fashion_mnist/   {train,t10k}-{images-idx3,labels-idx1}-ubyte, with or without .gz
    cifar10/cifar-10-batches-bin/    data_batch_1.bin ... data_batch_5.bin, test_batch.bin
    cifar100/cifar-100-binary/       train.bin, test.bin
    imagenet/                        described in `imagenet.py`

Missing files are downloaded. Existing files are read with any compression, because the sha256 of
the arrays is verified instead of that of the files. No such hash is available for CIFAR-100: there
the published md5 of the archive protects the download, and only sizes and label ranges are checked
when the files are read.
"""

from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import os
import pathlib
import tarfile
import tempfile
from typing import Any, NamedTuple

import numpy as np

from bnp_experiments import formats, imagenet
from bnp_experiments.errors import DataError, UsageError

_DIGITS_TEST_IMAGES = 500
_SEQUENCE_LENGTH = 64
_MNIST_FILES = (
  ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
  ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
)


class DataSet(NamedTuple):
  """Images (uint8, NHW or NHWC) and labels (unsigned), in their published order.

  Signals are float32, `[examples, time]`. A text has characters (uint8, `[sequences, time]`) and,
  as labels, the character after each.
  """

  x_train: Any
  y_train: np.ndarray
  x_test: Any
  y_test: np.ndarray
  classes: int


@dataclasses.dataclass(frozen=True)
class Source:
  """The files of a data set, their address and their checksums.

  Attributes:
    url: Address of the folder with the files to download.
    md5: The published md5 of each file to download, which may be an archive.
    files: The files to read, for training and for testing.
    read: Function that reads images and labels, given the paths, the number of images and the shape
      of an image.
    counts: Number of training and of test images.
    image: Shape of one image.
    classes: Number of classes.
    sha256: The sha256 of each array's bytes; empty if unknown.
  """

  url: str
  md5: Mapping[str, str]
  files: tuple[tuple[str, ...], tuple[str, ...]]
  read: Callable[[list[pathlib.Path], int, tuple[int, ...]], tuple[np.ndarray, np.ndarray]]
  counts: tuple[int, int]
  image: tuple[int, ...]
  classes: int
  sha256: Mapping[str, str]


def load(name: str) -> DataSet:
  """Load a data set, downloading missing files.

  Args:
    name: One of `NAMES`.

  Returns:
    The data set, with every array verified.

  Raises:
    UsageError: There is no data set of that name.
    DataError: A file is missing and cannot be downloaded, or is not the published file.
  """
  if name not in NAMES:
    raise UsageError(f"there is no data set {name!r}: choose from {', '.join(NAMES)}")
  if name == "mnist1d":
    return _mnist1d()
  if name == "digits":
    return _digits()
  if name == "pydoc":
    return _pydoc()
  default = pathlib.Path.home() / ".cache" / "bnp_optax"
  folder = pathlib.Path(os.environ.get("BNP_OPTAX_DATA") or default) / name
  if name == "imagenet":
    return DataSet(*imagenet.read(folder), classes=imagenet.CLASSES)
  source = SOURCES[name]
  names = [file for files in source.files for file in files]
  if missing := [file for file in names if not _variant(folder / file).exists()]:
    _download(source, folder, missing)
  arrays = {}
  for split, files, count in zip(("train", "test"), source.files, source.counts, strict=True):
    paths = [_variant(folder / file) for file in files]
    images, labels = source.read(paths, count, source.image)
    read = {f"x_{split}": images, f"y_{split}": labels}
    if difference := _difference(source, read, labels):
      raise DataError(
        f"{' or '.join(map(str, paths))} is not the published file: {difference}. Remove the "
        "altered file and run again to download it."
      )
    arrays |= read
  return DataSet(classes=source.classes, **arrays)


def _difference(source: Source, arrays: Mapping[str, np.ndarray], labels: np.ndarray) -> str:
  """Describe how arrays differ from the published ones; return an empty text if they do not."""
  for name, array in arrays.items():
    found = hashlib.sha256(array.tobytes()).hexdigest()
    if found != source.sha256.get(name, found):
      return f"the sha256 of {name} is {found}, expected {source.sha256[name]}"
  if labels.max() >= source.classes:
    return f"it contains label {labels.max()}, expected labels from 0 to {source.classes - 1}"
  return ""


def _variant(path: pathlib.Path) -> pathlib.Path:
  """Return the path of the file, or of its uncompressed form if only that one exists."""
  plain = path.with_suffix("")
  return plain if path.suffix == ".gz" and plain.exists() and not path.exists() else path


def _mnist1d() -> DataSet:
  """Return MNIST-1D (Greydanus and Kobak, 2024), which a program makes from a fixed seed.

  It has 4,000 training and 1,000 test signals of length 40.
  """
  from mnist1d.data import make_dataset

  state = np.random.get_state()
  made = make_dataset()
  np.random.set_state(state)  # The program sets the global seed.
  x, x_test = (made[name].astype(np.float32) for name in ("x", "x_test"))
  y, y_test = (made[name].astype(np.uint8) for name in ("y", "y_test"))
  return DataSet(x, y, x_test, y_test, classes=10)


def _digits() -> DataSet:
  """Return scikit-learn's 8x8 digits, split into training and 500 test images."""
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  pixels, labels = load_digits(return_X_y=True)
  # The grey values run from 0 to 16, those of all other data sets from 0 to 255.
  images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
  train, test = train_test_split(
    np.arange(len(labels)), test_size=_DIGITS_TEST_IMAGES, stratify=labels, random_state=0
  )
  labels = labels.astype(np.uint8)
  return DataSet(images[train], labels[train], images[test], labels[test], classes=10)


def _pydoc() -> DataSet:
  """Return the language reference that is part of Python, with its last tenth for testing.

  The text has half a megabyte and differs slightly between versions of Python.
  """
  from pydoc_data import topics

  text = "\n".join(body for _, body in sorted(topics.topics.items()))
  characters = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
  count = (len(characters) - 1) // _SEQUENCE_LENGTH
  end = count * _SEQUENCE_LENGTH
  x = characters[:end].reshape(count, _SEQUENCE_LENGTH)
  y = characters[1 : end + 1].reshape(count, _SEQUENCE_LENGTH)
  train = count - count // 10
  return DataSet(x[:train], y[:train], x[train:], y[train:], classes=128)


def _download(source: Source, folder: pathlib.Path, missing: list[str]) -> None:
  """Download missing files; move each into place only after its md5 is verified."""
  import pooch

  wanted = [name for name in source.md5 if name in missing or name.endswith(".tar.gz")]
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as stage:
      for name in wanted:
        md5 = f"md5:{source.md5[name]}"
        downloaded = pooch.retrieve(source.url + name, md5, fname=name, path=stage)
        if name.endswith(".tar.gz"):
          with tarfile.open(downloaded) as archive:
            archive.extractall(stage, filter="data")
      for name in missing:
        (folder / name).parent.mkdir(exist_ok=True)
        (pathlib.Path(stage) / name).replace(folder / name)
  except (OSError, ValueError, tarfile.TarError) as error:
    # The text of a failed connection is a page of nested retries, so show its type alone.
    reason = type(error).__name__ if "Connect" in type(error).__name__ else error
    served = " ".join(source.url + name for name in wanted)
    raise DataError(
      f"{folder / missing[0]} is missing and could not be downloaded from {served} ({reason}). Put "
      f"it there, or set BNP_OPTAX_DATA to a folder that contains {folder.name}/{missing[0]}."
    ) from error


SOURCES: dict[str, Source] = {
  "mnist": Source(
    # A mirror, because the site of MNIST's authors no longer serves the files to programs.
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    md5={
      "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
      "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
      "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
      "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    files=_MNIST_FILES,
    read=formats.read_idx_pair,
    counts=(60_000, 10_000),
    image=(28, 28),
    classes=10,
    sha256={
      "x_train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
      "y_train": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
      "x_test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
      "y_test": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
    },
  ),
  "fashion_mnist": Source(
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    md5={
      "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
      "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
      "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
      "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    files=_MNIST_FILES,
    read=formats.read_idx_pair,
    counts=(60_000, 10_000),
    image=(28, 28),
    classes=10,
    sha256={
      "x_train": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
      "y_train": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
      "x_test": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
      "y_test": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    },
  ),
  "cifar10": Source(
    url="https://www.cs.toronto.edu/~kriz/",
    md5={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    files=(
      tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)),
      ("cifar-10-batches-bin/test_batch.bin",),
    ),
    read=formats.read_cifar10,
    counts=(50_000, 10_000),
    image=(32, 32, 3),
    classes=10,
    sha256={
      "x_train": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
      "y_train": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
      "x_test": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
      "y_test": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    },
  ),
  "cifar100": Source(
    url="https://www.cs.toronto.edu/~kriz/",
    md5={"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
    files=(("cifar-100-binary/train.bin",), ("cifar-100-binary/test.bin",)),
    read=formats.read_cifar100,
    counts=(50_000, 10_000),
    image=(32, 32, 3),
    classes=100,
    sha256={},
  ),
}
NAMES = ("mnist1d", "digits", *SOURCES, "imagenet", "pydoc")
