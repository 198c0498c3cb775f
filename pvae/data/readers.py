"""Data sets by name or from a file, split into training, validation and test data."""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pvae.data.arrays import Array, Binarize, Data, MappedRows, check_binarize
from pvae.data.remote import FILES, REMOTE, download
from pvae.errors import ArgumentError, DataError, check_number, check_path

__all__ = ["NAMES", "Splits", "load", "read_idx"]

NAMES = ("digits", *REMOTE, "static_mnist", "freyfaces")
"""Data sets that `load` knows by name; all but the digits are looked for in a folder."""

Arrays = tuple[Array, ...]
Parts = tuple[Arrays, dict[str, Arrays], int | None]
"""A data set's arrays, the parts that it has of its own (such as ``"test"``), and its levels."""


@dataclass(frozen=True)
class Splits:
    """A data set in three parts.

    Attributes:
        name: Its name, or the file's.
        train: Training data; with dynamic binarisation, drawn anew for every batch.
        valid: Validation data; binarised once.
        test: Test data; binarised once.
        levels: Number of values that an entry can take, 0 to levels - 1; None if continuous.
        raw_levels: The same before binarisation.
    """

    name: str
    train: Data
    valid: Data
    test: Data
    levels: int | None
    raw_levels: int | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return self.train.event_shape


_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> np.ndarray:
    """Reads an IDX file, the format of the MNIST family, gzipped or not.

    Raises:
        DataError: If the file is missing, cut short or no IDX file.
    """
    path = check_path("path", path)
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(str(path), "a readable IDX file", f"{error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES:
        raise DataError(str(path), "an IDX file (two zero bytes, type, rank)", f"{raw[:4]!r}")
    rank, dtype = raw[3], np.dtype(_IDX_TYPES[raw[2]])
    start = 4 + 4 * rank
    shape = struct.unpack(f">{rank}I", raw[4:start]) if len(raw) >= start else ()
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(raw) != start + size:
        expected, got = f"{size} bytes of data for shape {shape}", f"{len(raw) - start} bytes"
        raise DataError(str(path), expected, got, ["the file was cut short: fetch it again"])
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def load(
    data: str | Path,
    data_dir: str | Path | None = None,
    *,
    binarize: Binarize = "none",
    valid: float | int | None = None,
    test: float | int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    fetch: bool = False,
) -> Splits:
    """Loads a data set by name or from a file.

    ================  ========================================================  =========
    name              what                                                      levels
    ================  ========================================================  =========
    ``digits``        scikit-learn's 8x8 digits; an entry counts the lit cells  0 to 16
                      of a 4x4 block; comes with scikit-learn
    ``mnist``,        28x28 images in IDX files, in the folder of that name     0 to 255
    ``fashion_mnist``,
    ``kmnist``
    ``static_mnist``  MNIST as binarised once by Larochelle & Murray (2011),    0, 1
                      from ``binarized_mnist.npz``
    ``freyfaces``     28x20 video frames, from ``freyfaces.npz``                0 to 255
    a file            ``.npy``; ``.npz`` with ``x`` (and ``y``) or ``train``,   bytes: 256
                      ``valid``, ``test``; IDX
    ================  ========================================================  =========

    Arguments:
        data: The name, or a path.
        data_dir: Folder for data sets; if None, the environment's ``PVAE_DATA``.
        binarize: ``"none"``, ``"threshold"``, ``"static"`` or ``"dynamic"`` (see `Data`).
        valid: Validation data: a number of rows, or a part below 1. Default: a tenth.
        test: Test data likewise, where the data set has none of its own.
        seed: Seed of the split and of fixed binarisation.
        shuffle: Whether rows are shuffled before they are split; otherwise the last ones are
            taken for test and validation.
        fetch: Download the data set if it isn't in the folder.

    Raises:
        ArgumentError: If an argument can't be used.
        DataError: If the data can't be found or read.

    Example:
        >>> splits = load("digits")
        >>> len(splits.train), len(splits.valid), len(splits.test), splits.event_shape
        (1437, 180, 180, (64,))
    """
    check_binarize(binarize)
    name = str(check_path("data", data))
    in_environment = os.environ.get("PVAE_DATA") or "."
    folder = check_path("data_dir", in_environment if data_dir is None else data_dir)
    if name in REMOTE and fetch:
        download(name, folder)
    arrays, own, levels = _read(name, folder)
    rows = np.arange(len(arrays[0]))
    left = np.random.default_rng(seed).permutation(rows) if shuffle else rows
    rows_of = {}
    for part, amount in (("test", test), ("valid", valid)):
        if part not in own:
            left, rows_of[part] = _cut(left, part, amount, len(rows))
    rows_of["train"] = left
    scale = 1.0 if levels in (None, 2) or binarize == "none" else 1.0 / (levels - 1)
    fixed: Binarize = "static" if binarize == "dynamic" else binarize

    def made(part: str, kind: Binarize, offset: int) -> Data:
        index = rows_of.get(part)
        chosen = own[part] if index is None else tuple(a[index] for a in arrays)
        return Data(chosen, scale, kind, seed=seed + offset, origin=index)

    parts = made("train", binarize, 0), made("valid", fixed, 1), made("test", fixed, 2)
    return Splits(name, *parts, levels=levels if binarize == "none" else 2, raw_levels=levels)


def _cut(
    rows: np.ndarray, where: str, amount: float | int | None, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Takes the last rows off: a number of them, or a part of all (a tenth, and at least one)."""
    count = max(1, round(0.1 * total))
    if amount is not None:
        amount = check_number(where, amount, minimum=0)
        count = round(amount * total) if amount < 1 else int(amount)
    if count >= len(rows):
        raise ArgumentError(where, f"fewer rows than the {len(rows)} that there are", f"{count}")
    keep = len(rows) - count
    return rows[:keep], rows[keep:]


def _read(name: str, folder: Path) -> Parts:
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.data.astype(np.float32), digits.target), {}, 17
    if name in REMOTE:
        files = [_find(folder / name, file.removesuffix(".gz"), name) for file in FILES]
        x, y, test_x, test_y = map(read_idx, files)
        return (x[:, None], y), {"test": (test_x[:, None], test_y)}, 256
    if name == "static_mnist":
        packed = _read_numpy(_find(folder, "binarized_mnist.npz", name))
        train, valid, test = (
            (np.unpackbits(packed[part], axis=1)[:, :784].reshape(-1, 1, 28, 28),)
            for part in ("train", "valid", "test")
        )
        return train, {"valid": valid, "test": test}, 2
    if name == "freyfaces":
        x = _read_numpy(_find(folder, "freyfaces.npz", name))["x"]
        return (x.reshape(-1, 1, 28, 20),), {}, 256
    return _read_file(Path(name))


def _find(folder: Path, stem: str, name: str) -> Path:
    for candidate in (folder / stem, folder / f"{stem}.gz"):
        if candidate.exists():
            return candidate
    fixes = ["--data-dir DIR, data_dir=DIR or the environment's PVAE_DATA=DIR"]
    if name in REMOTE:
        fixes.append("--download, or fetch=True")
    raise DataError(f"data set {name}", f"{stem} in {folder}", "no such file", fixes)


def _read_numpy(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")
        if isinstance(loaded, np.ndarray):
            return {"x": loaded}
        with loaded as archive:
            return dict(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        expected = f"an {path.suffix} file of numbers"
        raise DataError(str(path), expected, str(error).splitlines()[0]) from error


def _read_file(path: Path) -> Parts:
    if not path.exists():
        expected = f"one of {', '.join(NAMES)}, or a file"
        raise DataError("data", expected, f"'{path}', which doesn't exist")
    is_numpy = path.suffix in (".npy", ".npz")
    arrays = _read_numpy(path) if is_numpy else {"x": read_idx(path)}
    first = next((k for k in ("train", "x", *arrays) if k in arrays), "")
    if first not in ("train", "x") and len(arrays) != 1:
        got = ", ".join(arrays) or "nothing"
        raise DataError(str(path), "an array 'x' (and 'y'), or 'train'", got)
    x = arrays[first]
    _check_layout(path, x)
    own = [k for k in ("valid", "test") if first == "train" and k in arrays]
    labels = [arrays["y"]] if first == "x" and "y" in arrays else []

    def one(x: np.ndarray) -> Array:
        x = x[:, None] if x.ndim == 3 else x  # rows of one-channel images
        return MappedRows(x) if isinstance(x, np.memmap) else x

    return (one(x), *labels), {k: (one(arrays[k]),) for k in own}, _levels(x)


def _check_layout(path: Path, x: np.ndarray) -> None:
    if x.ndim < 2 or len(x) < 3:
        expected = "at least 3 rows of data, each with at least one axis"
        fixes = ["x[:, None], for one number a row"] if x.ndim == 1 else []
        raise DataError(str(path), expected, f"shape {x.shape}", fixes)
    if x.ndim == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        got = f"shape {x.shape}, with channels last"
        expected = "images with channels first, (N, C, H, W)"
        raise DataError(str(path), expected, got, ["np.moveaxis(x, -1, 1)"])


def _levels(x: np.ndarray) -> int | None:
    """Two where integers are all 0 or 1, 256 for other bytes; None if the type doesn't tell."""
    if x.dtype.kind not in "bui":
        return None
    if x.dtype.kind == "b" or (int(x.min()) >= 0 and int(x.max()) <= 1):
        return 2
    return 256 if x.dtype == np.uint8 else None
