"""Files of data that are damaged, foreign, or larger than they look: refused in one line."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import socket
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvae import data
from pvae.data import Limits
from pvae.errors import ArgumentError, DataError

X = np.arange(40, dtype=np.float32).reshape(10, 4)
BYTES = np.arange(40, dtype=np.uint8).reshape(10, 2, 2)


def npy(array: np.ndarray, **options: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array, **options)
    return content.getvalue()


def npz(**arrays: Any) -> bytes:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def zipped(method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, member in members.items():
            archive.writestr(name.replace("_", "."), member)
    return content.getvalue()


def idx(shape: tuple[int, ...], content: bytes = b"", kind: int = 8) -> bytes:
    sizes = b"".join(struct.pack(">I", size) for size in shape)
    return bytes([0, 0, kind, len(shape)]) + sizes + content


def headed(header: str, content: bytes = X.tobytes(), version: int = 1) -> bytes:
    """An .npy file with this text for a header."""
    text = header.encode() + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + content


def shaped(shape: str, dtype: str = "'<f4'", version: int = 1) -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}"
    return headed(text, version=version)


def flipped(content: bytes, place: int) -> bytes:
    found = bytearray(content)
    found[place] ^= 255
    return bytes(found)


class Bomb:
    """What runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


OBJECTS = np.array([Bomb(), Bomb(), Bomb()], dtype=object)

BROKEN: dict[str, tuple[bytes, str]] = {
    "flipped in an npz": (flipped(npz(x=X), 60), "a file of numbers; got .*Error"),
    "flipped in its directory": (flipped(npz(x=X), npz(x=X).index(b"PK\1\2")), "BadZip"),
    "flipped in a gz": (flipped(gzip.compress(idx((10, 2, 2), BYTES.tobytes())), 14), "Error"),
    "flipped in a checksum": (flipped(gzip.compress(idx((10, 4), BYTES.tobytes())), -6), "CRC"),
    "npz cut short": (npz(x=X)[:-30], "a file of numbers"),
    "npy cut short": (npy(X)[:-8], "160 bytes of data for shape .10, 4.; got 152"),
    "npy of a header alone": (npy(X)[:128], "160 bytes of data.*got 0 bytes"),
    "header cut short": (npy(X)[:40], "expected"),
    "gz cut short": (gzip.compress(idx((10, 4), bytes(40)))[:-9], "expected"),
    "IDX cut short": (idx((10, 4), bytes(39)), "40 bytes of data.*got 39"),
    "IDX with more": (idx((10, 4), bytes(41)), "40 bytes of data.*got more"),
    "gz with more": (gzip.compress(idx((10, 4), bytes(10**6))), "40 bytes of data.*got more"),
    "empty": (b"", "something in it; got an empty one"),
    "empty archive": (zipped(), "'x'.*got nothing"),
    "text": (b"1.0,2.0\n3.0,4.0\n", r"npy or \.npz; got b'1\.0,'"),
    "text in an archive": (zipped(x_txt=b"hi"), "'x'.*got nothing"),
    "text called npy": (zipped(x_npy=b"hi, this is text"), "an array that NumPy wrote"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "an IDX file"),
    "pickle": (pickle.dumps(OBJECTS), "an IDX file"),
    "objects": (npy(OBJECTS, allow_pickle=True), "dtype object, which would run code"),
    "objects in an npz": (npz(x=OBJECTS), "array 'x'.*dtype object, which would run code"),
    "objects for labels": (npz(x=X[:3], y=OBJECTS), "array 'y'.*dtype object"),
    "strings": (npy(np.array([["a", "b"]] * 4)), r"real numbers; got dtype <U1"),
    "complex": (npy(X.astype(complex)), "real numbers; got dtype complex128"),
    "dates": (npy(np.zeros((4, 2), "M8[s]")), "real numbers; got dtype datetime64"),
    "table": (npy(np.zeros(4, [("a", "f4"), ("b", "i4")])), "real numbers"),
    "negative": (shaped("(-10, 4)"), "none below 0; got shape"),
    "two negative": (shaped("(-10, -4)"), "none below 0"),
    "absurd": (shaped("(10000000, 10000000)"), "bytes of data for shape"),
    "absurd rows": (shaped("(1000000000000, 4)"), "at most 100000000 rows; got 1000000000000"),
    "beyond 64 bits": (shaped("(3, 36893488147419103232)"), "bytes of data for shape"),
    "zeros": (shaped("(10, 0)"), "numbers in it; got shape .10, 0."),
    "many axes": (shaped(f"({'1,' * 70})"), "at most 32 axes"),
    "no axis": (npy(np.float32(3.0)), "at least 3 rows"),  # type: ignore[arg-type]
    "one axis": (npy(np.zeros(9)), r"at least 3 rows.*(?s:.)*x\[:, None\]"),
    "two rows": (npy(X[:2]), "at least 3 rows"),
    "shape of text": (shaped("'ten'"), "a file of numbers"),
    "shape of numbers with points": (shaped("(10.0, 4.0)"), "a file of numbers"),
    "nested parentheses": (headed("{'descr': " + "(" * 5000), "a file of numbers"),
    "nested lists": (headed("[" * 9000), "a file of numbers"),
    "nested types": (shaped("(10, 4)", "[('a', " * 500 + "'<f4'" + ")]" * 500), "expected"),
    "array in an entry": (shaped("(10, 4)", "('<f4', (1000000, 1000000))"), "expected"),
    "code for a header": (headed("__import__('os').mkdir('ran')"), "a file of numbers"),
    "long header": (headed(" " * 20_000, version=2), "header of 20001 bytes"),
    "endless header": (b"\x93NUMPY\2\0\xff\xff\xff\xff{", "header of 4294967295 bytes"),
    "version 9": (shaped("(10, 4)", version=9), "version 09"),
    "other lengths": (npz(x=X, y=np.zeros(3)), "array 'y'.*10 rows, one for each datum; got 3"),
    "one label": (npz(x=X, y=np.float64(1.0)), "array 'y'.*10 rows.*got 0"),
    "other arrays": (npz(a=X, b=X), "an array 'x'.*got a, b"),
    "test of another shape": (npz(train=X, test=X[:, :3]), "array 'test'.*rows like those of"),
    "test of another kind": (npz(train=BYTES, test=BYTES / 255), "array 'test'.*rows like"),
    "test without rows": (npz(train=X, test=X[:0]), "array 'test'.*at least 1 rows"),
    "no test": (npz(test=X, valid=X), "'train'; got test, valid|'train'; got valid, test"),
    "wrapped sizes": (idx((2**31, 2**31, 4)), "at most 100000000 rows"),
    "wrapped to zero": (idx((2**16, 2**31, 2**31, 8)), "at most 2147483648 bytes"),
    "255 axes": (idx((1,) * 255, b"\1"), "1 to 32 axes"),
    "IDX without axes": (idx((), b"\1"), "1 to 32 axes"),
    "IDX with zero": (idx((10, 0, 28)), "numbers in it"),
    "IDX of unknown type": (idx((10, 4), bytes(40), kind=7), "an IDX file"),
    "other compression": (zipped(zipfile.ZIP_LZMA, x_npy=npy(X)), "method 14"),
    "gz in a gz": (gzip.compress(gzip.compress(idx((10, 4), bytes(40)))), "an IDX file"),
    "npy in a gz": (gzip.compress(npy(X)), r"an IDX file.*got b'\\x93NUM'"),
    "npz in an npz": (zipped(x_npy=npz(x=X)), "an array that NumPy wrote"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    """Whatever its name says; before, many of them gave a trace of NumPy's or of zlib's."""
    content, words = BROKEN[kind]
    for name in ("x.npy", "x.npz", "x-ubyte.gz"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"(?s){words}") as error:
            data.load(path)
        assert str(path) in error.value.where
        assert error.value.expected
        assert error.value.actual
        assert "\n" not in error.value.one_line()
        path.unlink()


def test_flipping_any_byte_of_a_compressed_file_is_found_or_harmless(tmp_path: Path) -> None:
    """Each of an .npz and of a gzipped IDX: the same numbers, or a refusal."""
    path = tmp_path / "x"
    for content in (npz(x=X), gzip.compress(idx((10, 4), bytes(range(40))), mtime=0)):
        path.write_bytes(content)
        expected = data.load(path, shuffle=False).train.arrays[0]
        found = 0
        for place in range(len(content)):
            path.write_bytes(flipped(content, place))
            try:
                got = data.load(path, shuffle=False).train.arrays[0]
                np.testing.assert_array_equal(got, expected)
            except DataError:
                found += 1
        assert found > len(content) / 3


READ: dict[str, bytes] = {
    "npy": npy(X),
    "columns first": npy(np.asfortranarray(X)),
    "big-endian": npy(X.astype(">f8")),
    "half": npy(X.astype(np.float16)),
    "version 2": shaped("(10, 4)", version=2),
    "npz": npz(x=X),
    "npz of one array": npz(q=np.asfortranarray(X)),
    "npz with names beside": npz(x=X, names=np.array(["a", "b", "c", "d"])),
    "IDX": idx((10, 4), X.astype(">f4").tobytes(), kind=0x0D),
    "gz": gzip.compress(idx((10, 4), X.astype(np.uint8).tobytes())),
}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.dat"])
def test_a_file_is_what_its_content_says(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(READ[kind])
    splits = data.load(tmp_path / name, shuffle=False)
    arrays = [np.asarray(s.arrays[0]) for s in (splits.train, splits.valid, splits.test)]
    np.testing.assert_array_equal(np.concatenate(arrays), X)


# Bombs


def peak(call: Callable[[], object]) -> int:
    """Most bytes of Python's memory at once."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BOMBS: dict[str, tuple[bytes, str]] = {
    "npz": (npz(x=np.zeros((1000, 4000))), "at most 1000000 bytes of arrays.*got 32000000"),
    "npz of parts": (
        npz(train=np.zeros((100, 1000)), test=np.zeros((40, 1000))),
        "at most 1000000 bytes.*got 1120000",
    ),
    "gz": (gzip.compress(idx((1000, 4000), bytes(4_000_000))), "1000000 bytes.*got 4000000"),
    "gz that goes on": (gzip.compress(idx((1000, 4), bytes(32_000_000))), "got more"),
    "npz that goes on": (
        zipped(x_npy=shaped("(10, 4)") + bytes(32_000_000)),
        "160 bytes of data.*got more",
    ),
    "rows": (npz(x=np.zeros((20_000, 2), np.uint8)), "at most 10000 rows; got 20000"),
    "rows of a map": (npy(np.zeros((20_000, 2), np.uint8)), "at most 10000 rows; got 20000"),
    "a promise": (zipped(x_npy=shaped("(10, 100000000000)")), "got 4000000000000"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_is_unpacked(kind: str, tmp_path: Path) -> None:
    content, words = BOMBS[kind]
    path = tmp_path / "x"
    path.write_bytes(content)

    def load() -> None:
        with pytest.raises(DataError, match=f"(?s){words}"):
            data.load(path, limits=Limits(max_bytes=10**6, max_rows=10**4))

    load()  # what is imported at first isn't counted
    assert peak(load) < 2_500_000


def test_what_a_refusal_says_to_try_lets_the_file_in(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(npz(x=np.zeros((200, 50))))
    for limits in (Limits(max_bytes=1000), Limits(max_rows=100)):
        with pytest.raises(DataError) as error:
            data.load(path, limits=limits)
        fix = error.value.fixes[0].removeprefix("limits=pvae.data.")
        assert len(data.load(path, limits=eval(fix)).train) == 160  # noqa: S307
    with pytest.raises(ArgumentError, match="max_bytes: expected an integer of at least 1"):
        Limits(max_bytes=0)


def test_promised_memory_isnt_taken(tmp_path: Path) -> None:
    """A header within the limits, of 2 GB, in a file of 300 bytes."""
    path = tmp_path / "x"
    for content in (
        zipped(x_npy=shaped("(10, 50000000)")),
        gzip.compress(idx((20, 10**8), bytes(100))),
        idx((20, 10**8), bytes(100)),
    ):
        path.write_bytes(content)

        def load() -> None:
            with pytest.raises(DataError, match="bytes of data for shape"):
                data.load(path)

        assert peak(load) < 2_500_000


# What is no file


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)  # a whole path may be too long for one


def make_unreadable(path: Path) -> None:
    path.write_bytes(npy(X))
    path.chmod(0)


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (lambda path: path.mkdir(), "a folder"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "pipe": (make_pipe, "a pipe"),
    "socket": (make_socket, "a socket"),
    "link to itself": (lambda path: path.symlink_to(path), "doesn't exist|symbolic links"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "doesn't exist|No such file"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    make, words = OTHERS[kind]
    path = tmp_path / "x.npy"
    make(path)
    for read in (data.load, data.read_idx):
        with pytest.raises(DataError, match=words):
            read(path)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "x/" * 2000, "\udcff"])
def test_odd_names_are_refused(name: str) -> None:
    for read in (data.load, data.read_idx):
        with pytest.raises((DataError, ArgumentError)) as error:
            read(name)
        error.value.one_line().encode()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    make_unreadable(tmp_path / "x.npy")
    with pytest.raises(DataError, match="Permission denied"):
        data.load(tmp_path / "x.npy")


# Data sets by name


def family(folder: Path, **changed: bytes) -> None:
    made = {
        "train-images-idx3-ubyte": idx((10, 28, 28), bytes(7840)),
        "train-labels-idx1-ubyte": idx((10,), bytes(10)),
        "t10k-images-idx3-ubyte": idx((5, 28, 28), bytes(3920)),
        "t10k-labels-idx1-ubyte": idx((5,), bytes(5)),
    }
    folder.mkdir()
    for name, content in made.items():
        (folder / name).write_bytes(changed.get("_".join(name.split("-")[:2]), content))


FAMILIES: dict[str, tuple[dict[str, bytes], str]] = {
    "labels": ({"train_labels": idx((9,), bytes(9))}, "10 rows, one for each datum; got 9"),
    "test labels": ({"t10k_labels": idx((6,), bytes(6))}, "5 rows, one for each datum; got 6"),
    "labels of two axes": ({"train_labels": idx((10, 1), bytes(10))}, r"bytes of shape \(N,?\)"),
    "images of two axes": ({"train_images": idx((10, 784), bytes(7840))}, r"shape \(N, 28, 28\)"),
    "images of two sizes": ({"t10k_images": idx((5, 27, 28), bytes(3780))}, r"shape \(N, 28, 28\)"),
    "real numbers": ({"train_images": idx((10, 28, 28), bytes(31360), 0x0D)}, "float32 of shape"),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_whose_files_dont_fit(kind: str, tmp_path: Path) -> None:
    changed, words = FAMILIES[kind]
    family(tmp_path / "mnist", **changed)
    with pytest.raises(DataError, match=words):
        data.load("mnist", tmp_path)


ARCHIVES: dict[str, tuple[str, bytes, str]] = {
    "no parts": ("static_mnist", npz(q=X), "an array 'train'; got 'q'"),
    "no test": ("static_mnist", npz(train=BYTES[:, 0], valid=BYTES[:, 0]), "an array 'test'"),
    "columns": (
        "static_mnist",
        npz(**dict.fromkeys(("train", "valid", "test"), BYTES[:, 0])),
        r"bytes of shape \(N, 98\); got uint8 of shape \(10, 2\)",
    ),
    "type": (
        "static_mnist",
        npz(**dict.fromkeys(("train", "valid", "test"), np.zeros((9, 98)))),
        "got float64",
    ),
    "no x": ("freyfaces", npz(q=X), "an array 'x'; got 'q'"),
    "pixels": ("freyfaces", npz(x=BYTES.reshape(10, 4)), r"bytes of shape \(N, 560\)"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_that_isnt_the_data_set(kind: str, tmp_path: Path) -> None:
    name, content, words = ARCHIVES[kind]
    file = {"static_mnist": "binarized_mnist.npz", "freyfaces": "freyfaces.npz"}[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=words):
        data.load(name, tmp_path)


def test_frames_of_either_layout_are_read(tmp_path: Path) -> None:
    frames = np.arange(20 * 560).reshape(20, 28, 20).astype(np.uint8)
    for x in (frames, frames.reshape(20, 560)):
        (tmp_path / "freyfaces.npz").write_bytes(npz(x=x))
        found = data.load("freyfaces", tmp_path, shuffle=False)
        np.testing.assert_array_equal(found.train.arrays[0], frames[:16, None])
