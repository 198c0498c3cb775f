"""Data sets by name or from a file, split into training, validation and test data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pvae.annotations import strict
from pvae.data.arrays import Array, Binarize, Data, MappedRows, check_binarize
from pvae.data.formats import Arrays, Limits, read_idx
from pvae.data.remote import FILES, REMOTE, download
from pvae.errors import ArgumentError, DataError, check_number, check_path

__all__ = ["NAMES", "Splits", "load"]

NAMES = ("digits", *REMOTE, "static_mnist", "freyfaces")
"""Data sets that `load` knows by name; all but the digits are looked for in a folder."""

Parts = tuple[tuple[Array, ...], dict[str, tuple[Array, ...]], int | None]
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


@strict
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
    limits: Limits | None = None,
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
        limits: How large the arrays of a file may be, unpacked; None for those of `Limits`.

    Raises:
        ArgumentError: If an argument can't be used.
        DataError: If the data can't be found or read, or are larger than the limits.

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
    arrays, own, levels = _read(name, folder, limits or Limits())
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


def _read(name: str, folder: Path, limits: Limits) -> Parts:
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.data.astype(np.float32), digits.target), {}, 17
    if name in REMOTE:
        return _read_family(folder, name, limits)
    if name == "static_mnist":
        path = _find(folder, "binarized_mnist.npz", name)
        parts = ["train", "valid", "test"]
        train, valid, test = (
            (np.unpackbits(_shaped(path, part, x, (98,)), axis=1)[:, :784].reshape(-1, 1, 28, 28),)
            for part, x in zip(parts, Arrays(path, limits).read(*parts), strict=True)
        )
        return train, {"valid": valid, "test": test}, 2
    if name == "freyfaces":
        path = _find(folder, "freyfaces.npz", name)
        (x,) = Arrays(path, limits).read("x")
        shape = (28, 20) if x.ndim == 3 else (560,)
        return (_shaped(path, "x", x, shape).reshape(-1, 1, 28, 20),), {}, 256
    return _read_file(Path(name), limits)


def _shaped(path: Path, name: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a known data set, whose rows are bytes of this shape."""
    if x.dtype != np.uint8 or x.shape[1:] != shape or not x.ndim:
        expected = f"bytes of shape {('N', *shape)}".replace("'", "")
        actual = f"{x.dtype} of shape {x.shape}"
        raise DataError(f"{path}, array '{name}'", expected, actual, ["fetch the file again"])
    return x


def _read_family(folder: Path, name: str, limits: Limits) -> Parts:
    """A data set of the MNIST family: images and labels for training, and for the test."""
    paths = [_find(folder / name, file.removesuffix(".gz"), name) for file in FILES]
    x, y, test_x, test_y = (read_idx(path, limits) for path in paths)
    size = x.shape[1:] if x.ndim == 3 else (28, 28)
    for path, images in ((paths[0], x), (paths[2], test_x)):
        _shaped(path, "images", images, size)
    for path, images, labels in ((paths[1], x, y), (paths[3], test_x, test_y)):
        _shaped(path, "labels", labels, ())
        _check_lengths(path, "labels", len(labels), len(images))
    return (x[:, None], y), {"test": (test_x[:, None], test_y)}, 256


def _check_lengths(path: Path, name: str, rows: int, expected: int) -> None:
    if rows != expected:
        where, fixes = f"{path}, array '{name}'", ["files that were made together"]
        raise DataError(where, f"{expected} rows, one for each datum", f"{rows} rows", fixes)


def _find(folder: Path, stem: str, name: str) -> Path:
    for candidate in (folder / stem, folder / f"{stem}.gz"):
        if candidate.exists():
            return candidate
    fixes = ["--data-dir DIR, data_dir=DIR or the environment's PVAE_DATA=DIR"]
    if name in REMOTE:
        fixes.append("--download, or fetch=True")
    raise DataError(f"data set {name}", f"{stem} in {folder}", "no such file", fixes)


def _read_file(path: Path, limits: Limits) -> Parts:
    if not os.path.exists(path):  # noqa: PTH110  which raises nothing, whatever the name
        expected = f"one of {', '.join(NAMES)}, or a file"
        raise DataError("data", expected, f"'{path}', which doesn't exist")
    arrays = Arrays(path, limits)
    names = arrays.names
    first = next((k for k in ("train", "x", *names) if k in names), "")
    if first not in ("train", "x") and len(names) != 1:
        got = ", ".join(names[:10]) or "nothing"
        fixes = ["np.savez('data.npz', x=x)"]
        raise DataError(str(path), "an array 'x' (and 'y'), or 'train'", got, fixes)
    own = [k for k in ("valid", "test") if first == "train" and k in names]
    labels = ["y"] if first == "x" and "y" in names else []
    for name in (first, *own):
        _check_layout(path, name, arrays.shape_of(name), 3 if name == first else 1)
    if labels:
        rows, *_ = *arrays.shape_of("y"), 0
        _check_lengths(path, "y", rows, arrays.shape_of("x")[0])
    x, *others = arrays.read(first, *own, *labels)
    for name, other in zip(own, others, strict=False):
        _check_alike(path, name, other, x)

    def one(x: np.ndarray) -> Array:
        x = x[:, None] if x.ndim == 3 else x  # rows of one-channel images
        return MappedRows(x) if isinstance(x, np.memmap) else x

    parts: dict[str, tuple[Array, ...]] = {
        name: (one(other),) for name, other in zip(own, others, strict=False)
    }
    return (one(x), *others[len(own) :]), parts, _levels(x)


def _check_alike(path: Path, name: str, x: np.ndarray, train: np.ndarray) -> None:
    """Refuses a part whose rows aren't of the shape and kind of the training data."""
    if x.shape[1:] != train.shape[1:] or x.dtype.kind != train.dtype.kind:
        expected = f"rows like those of 'train', of shape {train.shape[1:]} and {train.dtype}"
        actual = f"shape {x.shape[1:]} and {x.dtype}"
        raise DataError(
            f"{path}, array '{name}'", expected, actual, [f"{name}.astype(train.dtype)"]
        )


def _check_layout(path: Path, name: str, shape: tuple[int, ...], least: int) -> None:
    where = f"{path}, array '{name}'"
    if len(shape) < 2 or shape[0] < least:
        expected = f"at least {least} rows of data, each with at least one axis"
        fixes = ["x[:, None], for one number a row" if len(shape) == 1 else "np.save('x.npy', x)"]
        raise DataError(where, expected, f"shape {shape}", fixes)
    if len(shape) == 4 and shape[-1] in (1, 3, 4) and shape[1] not in (1, 3, 4):
        got = f"shape {shape}, with channels last"
        expected = "images with channels first, (N, C, H, W)"
        raise DataError(where, expected, got, ["np.moveaxis(x, -1, 1)"])


def _levels(x: np.ndarray) -> int | None:
    """Two where integers are all 0 or 1, 256 for other bytes; None if the type doesn't tell."""
    if x.dtype.kind not in "bui":
        return None
    if x.dtype.kind == "b" or (int(x.min()) >= 0 and int(x.max()) <= 1):
        return 2
    return 256 if x.dtype == np.uint8 else None
