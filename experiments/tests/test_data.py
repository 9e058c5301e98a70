"""Tests of the data sets: canonical files are read, and all other files are refused."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import socket
import struct
import tarfile
import threading

from bnp_experiments import data
from bnp_experiments.errors import DataError, UsageError
import numpy as np
import pytest

COUNTS = (10, 4)
PUBLISHED = {name: data.SOURCES[name] for name in data.SOURCES}


def _arrays(source):
  rng = np.random.default_rng(0)
  arrays = {}
  for split, count in zip(("train", "test"), COUNTS, strict=True):
    arrays[f"x_{split}"] = rng.integers(0, 256, (count, *source.image), np.uint8)
    arrays[f"y_{split}"] = rng.integers(0, source.classes, count, np.uint8)
  return arrays


def _idx(array):
  return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def _cifar(images, labels, coarse):
  planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
  columns = [labels[:, None] // 5] if coarse else []
  return np.concatenate([*columns, labels[:, None], planes], axis=1).tobytes()


def _canonical_files(name, arrays):
  """Return the files of a small data set in their published format, by name."""
  source = PUBLISHED[name]
  files = {}
  for split, names in zip(("train", "test"), source.files, strict=True):
    x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if name.startswith("cifar"):
      parts = zip(names, np.split(x, len(names)), np.split(y, len(names)), strict=True)
      files |= {part: _cifar(px, py, name == "cifar100") for part, px, py in parts}
    else:
      files |= {names[0]: gzip.compress(_idx(x)), names[1]: gzip.compress(_idx(y))}
  return files


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("BNP_OPTAX_DATA", str(tmp_path / "data"))
  return tmp_path / "data"


@pytest.fixture
def offline(monkeypatch):
  def refuse(*args, **kwargs):
    raise socket.gaierror("no network in this test")

  monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(params=list(data.SOURCES))
def small(request, monkeypatch):
  """Register a data set with few images; return its name, its arrays and its files."""
  name = request.param
  arrays = _arrays(data.SOURCES[name])
  hashes = {part: hashlib.sha256(array.tobytes()).hexdigest() for part, array in arrays.items()}
  if name == "cifar100":
    hashes = {}
  source = dataclasses.replace(data.SOURCES[name], counts=COUNTS, sha256=hashes)
  monkeypatch.setitem(data.SOURCES, name, source)
  return name, arrays, _canonical_files(name, arrays)


def _write(folder, files):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _assert_equal(dataset, arrays):
  for part, array in arrays.items():
    np.testing.assert_array_equal(getattr(dataset, part), array)
    assert getattr(dataset, part).dtype == np.uint8


def test_reads_the_canonical_files(home, offline, small):
  name, arrays, files = small
  _write(home / name, files)
  _assert_equal(data.load(name), arrays)


@pytest.mark.parametrize("small", ["mnist", "fashion_mnist"], indirect=True)
def test_reads_uncompressed_files_and_other_compressions(home, offline, small):
  name, arrays, files = small
  for number, (file, content) in enumerate(files.items()):
    plain = gzip.decompress(content)
    named = {file: gzip.compress(plain, 1)} if number % 2 else {file.removesuffix(".gz"): plain}
    _write(home / name, named)
  _assert_equal(data.load(name), arrays)


def test_refuses_truncated_files(home, offline, small):
  name, _, files = small
  for file, content in files.items():
    _write(home / name, files | {file: content[:-1]})
    with pytest.raises(DataError, match=file):
      data.load(name)
    _write(home / name, files | {file: b""})
    with pytest.raises(DataError, match=file):
      data.load(name)


@pytest.mark.parametrize("small", ["mnist", "fashion_mnist", "cifar10"], indirect=True)
def test_refuses_a_flipped_bit(home, offline, small):
  name, _, files = small
  for file, content in files.items():
    plain = bytearray(gzip.decompress(content) if file.endswith(".gz") else content)
    plain[-1] ^= 1
    altered = gzip.compress(bytes(plain)) if file.endswith(".gz") else bytes(plain)
    _write(home / name, files | {file: altered})
    with pytest.raises(DataError, match=f"{file}.*(sha256|label)"):
      data.load(name)


@pytest.mark.parametrize("small", ["cifar100"], indirect=True)
def test_refuses_labels_out_of_range(home, offline, small):
  name, arrays, _ = small
  arrays["y_test"][2] = 100
  _write(home / name, _canonical_files(name, arrays))
  with pytest.raises(DataError, match=r"test\.bin.* label 100"):
    data.load(name)


@pytest.mark.parametrize("small", ["mnist"], indirect=True)
@pytest.mark.parametrize(
  "header", [(0, 0, 9, 3, 10, 28, 28), (0, 0, 8, 3, 10, 28, 27), (0, 0, 8, 1, 7840, 0, 0)]
)
def test_refuses_a_different_header(home, offline, small, header):
  name, arrays, files = small
  bad = struct.pack(">BBBB3I", *header) + arrays["x_train"].tobytes()
  _write(home / name, files | {"train-images-idx3-ubyte.gz": gzip.compress(bad)})
  with pytest.raises(DataError, match="begins with the bytes 00 00 0"):
    data.load(name)


def test_absent_and_offline_says_which_file_is_wanted_where(home, offline, small):
  name, _, files = small
  with pytest.raises(DataError) as raised:
    data.load(name)
  message = str(raised.value)
  assert str(home / name / next(iter(files))) in message
  assert PUBLISHED[name].url in message
  assert "BNP_OPTAX_DATA" in message


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, offline, small):
  (tmp_path / "file").touch()
  monkeypatch.setenv("BNP_OPTAX_DATA", str(tmp_path / "file"))
  with pytest.raises(DataError, match="BNP_OPTAX_DATA"):
    data.load(small[0])


@pytest.fixture
def site(tmp_path, monkeypatch, small):
  """Serve the files of the small data set over HTTP, in an archive if they are published so."""
  name, _, files = small
  root = tmp_path / "site"
  root.mkdir()
  served = files
  if name.startswith("cifar"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
      for file, content in files.items():
        member = tarfile.TarInfo(file)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    served = {next(iter(PUBLISHED[name].md5)): buffer.getvalue()}
  _write(root, served)

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      pass

  handler = functools.partial(Quiet, directory=root)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in served.items()}
    url = f"http://127.0.0.1:{server.server_port}/"
    source = dataclasses.replace(data.SOURCES[name], url=url, md5=md5)
    monkeypatch.setitem(data.SOURCES, name, source)
    yield root
    server.shutdown()


def test_downloads_missing_files_only(home, small, site):
  name, arrays, files = small
  first, *rest = files
  _write(home / name, {first: files[first]})
  before = (home / name / first).stat().st_mtime_ns
  _assert_equal(data.load(name), arrays)
  assert (home / name / first).stat().st_mtime_ns == before
  assert all((home / name / file).exists() for file in rest)
  found = [path for path in (home / name).rglob("*") if path.is_file()]
  assert len(found) == len(files)


def test_an_altered_download_leaves_nothing_behind(home, small, site):
  name = small[0]
  for path in site.iterdir():
    path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(DataError, match="could not be downloaded"):
    data.load(name)
  assert list((home / name).rglob("*")) == []


@pytest.mark.slow
def test_mnist1d_is_made_the_same_way_every_time():
  np.random.seed(7)
  expected = np.random.rand()
  np.random.seed(7)
  signals = data.load("mnist1d")
  assert np.random.rand() == expected
  assert signals.x_train.shape == (4000, 40)
  assert signals.x_test.shape == (1000, 40)
  assert signals.x_train.dtype == np.float32
  assert abs(signals.x_train.std() - 1) < 0.01
  assert np.bincount(signals.y_train).tolist() == (500 - np.bincount(signals.y_test)).tolist()
  np.testing.assert_array_equal(signals.x_train, data.load("mnist1d").x_train)


def test_digits_are_split_the_same_way_every_time():
  digits = data.load("digits")
  assert digits.x_train.shape == (1297, 8, 8)
  assert digits.x_test.shape == (500, 8, 8)
  assert digits.x_train.max() == 255
  assert np.bincount(digits.y_test).min() >= 48
  np.testing.assert_array_equal(digits.x_train, data.load("digits").x_train)


def test_an_unknown_name():
  with pytest.raises(UsageError, match=r"svhn.*mnist1d, digits, mnist"):
    data.load("svhn")


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_the_published_files(name, offline):
  dataset = data.load(name)
  source = data.SOURCES[name]
  assert dataset.x_train.shape == (source.counts[0], *source.image)
  assert dataset.x_test.shape == (source.counts[1], *source.image)
  assert np.bincount(dataset.y_test).tolist() == [1000] * 10 or name == "mnist"
