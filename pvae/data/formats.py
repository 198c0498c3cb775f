"""Files of numbers: NumPy's ``.npy`` and ``.npz``, and IDX, read within limits.

Headers are read first. What they promise is compared with the limits and with the file before
memory is taken for it, and what is packed is unpacked no further than its header says. Nothing in
a file is ever run: an array of Python objects is refused. What a file is, its content tells, not
its name.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

import numpy as np

from pvae.annotations import check_fields, strict
from pvae.errors import DataError, PvaeError, check_file, check_int, check_path

__all__ = ["Arrays", "Limits", "read_idx"]

_NUMPY, _ZIP, _GZIP = b"\x93NUMPY", b"PK", b"\x1f\x8b"
_SUFFIX = ".npy"
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_LONGEST_HEADER = 10_000  # bytes of an array's header, which NumPy's own reader takes, too
_MOST_AXES = 32
_MOST_ARRAYS = 1000
_BLOCK = 2**20
_AGAIN = "the file is damaged or cut short: fetch or write it again"


@dataclass(frozen=True)
class Limits:
    """How much a file may become in memory, so that a small one can't fill it.

    Arguments:
        max_bytes: Most bytes of the arrays that are read from a file, unpacked; 2 GiB. An ``.npy``
            file is mapped, row by row, and takes no memory as a whole, so it isn't counted.
        max_rows: Most rows of an array.

    Example:
        >>> Limits(max_bytes=2**33).max_rows
        100000000
    """

    max_bytes: int = 2**31
    max_rows: int = 10**8

    def __post_init__(self) -> None:
        check_fields(self)
        check_int("max_bytes", self.max_bytes)
        check_int("max_rows", self.max_rows)

    def check(self, where: str, num_bytes: int, shape: tuple[int, ...]) -> None:
        """Refuses what is larger, or has no numbers.

        Raises:
            DataError: With the limit that would let it in.
        """
        if 0 in shape:
            got = f"shape {_short_text(shape)}"
            raise DataError(where, "an array with numbers in it", got, [_AGAIN])
        if shape and shape[0] > self.max_rows:
            fixes = _larger("max_rows", shape[0])
            raise DataError(where, f"at most {self.max_rows} rows", f"{shape[0]} rows", fixes)
        if num_bytes > self.max_bytes:
            expected = f"at most {self.max_bytes} bytes of arrays, unpacked"
            raise DataError(where, expected, f"{num_bytes} bytes", _larger("max_bytes", num_bytes))


def _larger(name: str, number: int) -> list[str]:
    flag = f"--{name.replace('max_', 'max-file-')} {number}"
    return [f"limits=pvae.data.Limits({name}={number})", f"{flag}, of pvae train"]


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"] = "C"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Arrays:
    """The arrays in a file by name, whose headers alone have been read; ``"x"`` for the only one.

    Arguments:
        path: The file.
        limits: How large what is read may be, all arrays together.

    Attributes:
        names: Their names.

    Raises:
        DataError: If it is no file of numbers.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        check_file(path, DataError)
        self.path, self.limits = path, limits
        self._is_archive = False
        with _told(path):
            self._headers = self._read_headers()
        self.names = tuple(self._headers)

    def _read_headers(self) -> dict[str, _Header]:
        with self.path.open("rb") as file:
            first = file.read(len(_NUMPY))
            file.seek(0)
            if first == _NUMPY:
                return {"x": _numpy_header(str(self.path), file)}
            if not first.startswith(_ZIP):
                with _unpacked(file) as stream:
                    return {"x": _idx_header(self.path, stream)}
            self._is_archive = True
            with zipfile.ZipFile(file) as archive:
                members = [info for info in archive.infolist() if info.filename.endswith(_SUFFIX)]
                if len(members) > _MOST_ARRAYS:
                    expected = f"at most {_MOST_ARRAYS} arrays in a file"
                    fixes = ["np.savez('data.npz', x=x)"]
                    raise DataError(str(self.path), expected, f"{len(members)}", fixes)
                named = ((info.filename.removesuffix(_SUFFIX), info) for info in members)
                return {name: self._member_header(archive, name, info) for name, info in named}

    def _where(self, name: str) -> str:
        return f"{self.path}, array {name!r}" if self._is_archive else str(self.path)

    def _member_header(self, archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> _Header:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            expected = "a method of compression that NumPy writes"
            actual, fixes = f"method {info.compress_type}", ["np.savez_compressed('data.npz', x=x)"]
            raise DataError(self._where(name), expected, actual, fixes)
        with archive.open(info) as member:
            return _numpy_header(self._where(name), cast("BinaryIO", member))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of an array of numbers.

        Raises:
            DataError: If it is absent, or of something else.
        """
        if name not in self._headers:
            got = ", ".join(map(repr, self.names[:10])) or "nothing"
            fixes = [f"np.savez('data.npz', {name}=x)"]
            raise DataError(str(self.path), f"an array '{name}'", got, fixes)
        _check_numbers(self._where(name), self._headers[name])
        return self._headers[name].shape

    def read(self, *names: str) -> list[np.ndarray]:
        """The arrays of these names; a memory map, where the file is nothing but an ``.npy``.

        Raises:
            DataError: If one is absent, cut short, or damaged, or they are larger than the limits.
        """
        for name in names:
            self.shape_of(name)
        if self._is_archive:
            total = sum(self._headers[name].nbytes for name in names)
            self.limits.check(str(self.path), total, ())
        with _told(self.path):
            return [self._read(name) for name in names]

    def _read(self, name: str) -> np.ndarray:
        where, header = self._where(name), self._headers[name]
        if self._is_archive:
            self.limits.check(where, header.nbytes, header.shape)
            with zipfile.ZipFile(self.path) as archive, archive.open(name + _SUFFIX) as member:
                stream = cast("BinaryIO", member)
                return _filled(where, stream, _numpy_header(where, stream))
        with self.path.open("rb") as file:
            if file.read(len(_NUMPY)) != _NUMPY:
                return read_idx(self.path, self.limits)
            self.limits.check(where, 0, header.shape)
            file.seek(0)
            shape, dtype, order = _numpy_header(where, file)
            start = file.tell()
        if (there := self.path.stat().st_size - start) < header.nbytes:
            raise _short(where, header, there)
        return np.memmap(self.path, dtype, "r", start, shape, order)


@strict
def read_idx(path: str | Path, limits: Limits | None = None) -> np.ndarray:
    """Reads an IDX file, the format of the MNIST family, gzipped or not.

    Arguments:
        path: The file.
        limits: How large it may be, unpacked; None for those of `Limits`.

    Raises:
        DataError: If the file is missing, cut short, larger than the limits or no IDX file.
    """
    path = check_path("path", path)
    limits = limits or Limits()
    check_file(path, DataError)
    with _told(path, "a readable IDX file"), path.open("rb") as file, _unpacked(file) as stream:
        header = _idx_header(path, stream)
        limits.check(str(path), header.nbytes, header.shape)
        array = _filled(str(path), stream, header)
    return array.astype(header.dtype.newbyteorder("="), copy=False)


@contextmanager
def _unpacked(file: BinaryIO) -> Iterator[BinaryIO]:
    """The content of a file, whether it is gzipped or not."""
    is_packed = file.read(2) == _GZIP
    file.seek(0)
    if is_packed:
        with gzip.GzipFile(fileobj=file) as stream:
            yield cast("BinaryIO", stream)
    else:
        yield file


def _idx_header(path: Path, stream: BinaryIO) -> _Header:
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES:
        expected = "an IDX file (two zero bytes, type, rank), .npy or .npz"
        fixes = ["np.save('x.npy', x), of the data as an array x"]
        raise DataError(str(path), expected, repr(head) if head else "an empty file", fixes)
    rank = head[3]
    sizes = stream.read(4 * rank)
    if len(sizes) < 4 * rank or not 0 < rank <= _MOST_AXES:
        expected = f"the sizes of 1 to {_MOST_AXES} axes"
        raise DataError(str(path), expected, f"{len(sizes) // 4} of {rank}", [_AGAIN])
    return _Header(struct.unpack(f">{rank}I", sizes), np.dtype(_IDX_TYPES[head[2]]))


def _numpy_header(where: str, stream: BinaryIO) -> _Header:
    """Shape, type and order of an array as `np.save` writes it; the stream is at its numbers."""
    if stream.read(6) != _NUMPY:
        raise DataError(where, "an array that NumPy wrote", "something else", [_AGAIN])
    version = stream.read(2)
    size = 2 if version == b"\x01\0" else 4
    length = int.from_bytes(stream.read(size), "little")
    if version not in (b"\x01\0", b"\x02\0") or length > _LONGEST_HEADER:
        got = f"version {version.hex('.')}, header of {length} bytes"
        raise DataError(where, "an array of numbers", got, ["np.save('x.npy', x)"])
    content = struct.pack("<H", length) + stream.read(length)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(content))
    return _Header(shape, dtype, "F" if is_fortran else "C")


def _check_numbers(where: str, header: _Header) -> None:
    """Refuses an array of anything but real numbers, and a shape that none can have."""
    shape, dtype, _ = header
    if dtype.kind not in "biuf":
        actual = f"dtype {dtype}" + ", which would run code when it is read" * dtype.hasobject
        fixes = ["x.astype(float)", "np.unique(x, return_inverse=True)[1], for names of classes"]
        raise DataError(where, "an array of real numbers", actual, fixes)
    if len(shape) > _MOST_AXES or any(length < 0 for length in shape):
        expected = f"a shape of at most {_MOST_AXES} axes, none below 0"
        raise DataError(where, expected, f"shape {_short_text(shape)}", [_AGAIN])


def _filled(where: str, stream: BinaryIO, header: _Header) -> np.ndarray:
    """The numbers of an array, as many as the header promises: no more, no less.

    Memory is taken as they come, so that a header that promises too much takes none.
    """
    content, left = io.BytesIO(), header.nbytes
    while left and (block := stream.read(min(left, _BLOCK))):
        content.write(block)
        left -= len(block)
    if left or stream.read(1):  # at the end, the checksum is looked at, too
        raise _short(where, header, None if not left else header.nbytes - left)
    flat = np.frombuffer(content.getbuffer(), header.dtype)
    return flat.reshape(header.shape, order=header.order)


def _short(where: str, header: _Header, there: int | None) -> DataError:
    expected = f"{header.nbytes} bytes of data for shape {_short_text(header.shape)}"
    return DataError(where, expected, "more" if there is None else f"{there} bytes", [_AGAIN])


def _short_text(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 8 else f"of {len(shape)} axes"


@contextmanager
def _told(path: Path, expected: str = "a file of numbers") -> Iterator[None]:
    """Tells by a `DataError` whatever a reader of NumPy or of archives finds wrong with a file."""
    try:
        yield
    except PvaeError:
        raise
    except Exception as error:  # zlib, lzma, zipfile, struct, ast and tokenize have their own
        first, *_ = str(error).splitlines() or [""]
        actual = f"{type(error).__name__}: {first[:200]}"
        raise DataError(str(path), expected, actual, [_AGAIN]) from error
