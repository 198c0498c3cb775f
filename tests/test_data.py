"""Sources, batches, readers, binarisation, downloads."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pvae import data
from pvae.data import Batches, Data, as_source, remote
from pvae.errors import ArgumentError, DataError

SHARED = os.environ.get("PVAE_DATA")


def rows(batches: Batches, epoch: int, start: int = 0) -> list[int]:
    return [int(i) for batch in batches.epoch(epoch, start) for i in batch[0].flatten()]


# Batches


def test_an_epoch_visits_every_row_once(device: torch.device) -> None:
    batches = Batches(as_source(torch.arange(23), device), 5, seed=3)
    assert batches.steps_per_epoch == 5
    for epoch in range(3):
        assert sorted(rows(batches, epoch)) == list(range(23))
    assert rows(batches, 0) != rows(batches, 1)


def test_order_is_a_function_of_seed_epoch_and_step(device: torch.device) -> None:
    source = as_source(torch.arange(23), device)
    a, b = Batches(source, 5, seed=3), Batches(source, 5, seed=3)
    rows(a, 0)
    torch.rand(7)
    assert rows(a, 4) == rows(b, 4)
    assert rows(a, 4, start=2) == rows(b, 4)[10:]
    assert rows(Batches(source, 5, seed=4), 4) != rows(b, 4)


def test_every_row_is_equally_likely_first() -> None:
    """400 epochs of 8 rows: each count is Bin(400, 1/8); 5.2 deviations, 8 * 2e-7 < 1e-5."""
    batches = Batches(as_source(torch.arange(8)), 8)
    counts = np.bincount([rows(batches, e)[0] for e in range(400)], minlength=8)
    assert (abs(counts - 50) < 5.2 * np.sqrt(400 * 7 / 64)).all()


def test_without_shuffling_rows_come_in_order() -> None:
    batches = Batches(as_source(torch.arange(6)), 4, shuffle=False)
    assert rows(batches, 0) == rows(batches, 1) == list(range(6))


def test_a_batch_isnt_larger_than_the_data() -> None:
    assert Batches(as_source(torch.arange(6)), 100).batch_size == 6


# Sources


def test_types(device: torch.device) -> None:
    """Floating numbers are cast, bytes of data become numbers, bytes elsewhere labels."""
    x = np.arange(6, dtype=np.uint8).reshape(3, 2)
    y = np.arange(3, dtype=np.uint8)
    keep, weight = np.array([True, False, True]), np.ones(3)
    source = as_source((x, y, keep, weight), device, torch.float32)
    batch = source.rows(torch.tensor([2, 0], device=device))
    assert [b.dtype for b in batch] == [torch.float32, torch.int64, torch.bool, torch.float32]
    assert batch[0].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert batch[1].tolist() == [2, 0]
    assert all(b.device.type == device.type for b in batch)


@pytest.mark.parametrize("dtype", [">f4", ">u2", "<u2", "u4"])
def test_odd_types_of_files(dtype: str) -> None:
    array = np.arange(6).reshape(3, 2).astype(dtype)
    (batch,) = as_source(array).rows(torch.tensor([1]))
    assert batch.tolist() == [[2, 3]]


def test_a_read_only_array_isnt_shared() -> None:
    array = np.zeros((3, 2))
    array.flags.writeable = False
    (batch,) = as_source(array, dtype=torch.float64).rows(torch.tensor([0]))
    batch += 1
    assert array[0, 0] == 0


def test_a_memory_map_is_read_a_batch_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """The same batches as of an array, fetched by a thread that ends with the epoch."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((10, 3)))
    mapped = data.Data(np.load(tmp_path / "x.npy", mmap_mode="r"), binarize="dynamic")
    whole = data.Data(np.load(tmp_path / "x.npy"), binarize="dynamic")
    source = data.as_source(mapped, device, torch.float64)
    batches = data.Batches(source, 4)
    expected = list(data.Batches(data.as_source(whole, device, torch.float64), 4).epoch(1))
    rows, fetched = source.rows, []

    def counted(*args: Any) -> Any:
        fetched.append(threading.current_thread())
        if len(fetched) == 5:
            raise OSError("the disk is gone")
        return rows(*args)

    monkeypatch.setattr(source, "rows", counted)
    found = []
    for batch in batches.epoch(1):
        found.append(batch)
        deadline = time.monotonic() + 30
        while len(fetched) < min(3, len(found) + 1):  # the next one, while this one is in use
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert len(found) == len(expected) == 3
    for (x,), (y,) in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    with pytest.raises(OSError, match="the disk is gone"):
        list(batches.epoch(0))
    fetched.clear()
    stopped = batches.epoch(0)
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    assert not any(thread.is_alive() for thread in fetched)
    assert threading.current_thread() not in fetched


def test_a_memory_map_is_read_by_rows(tmp_path: Path) -> None:
    """Nothing but the rows asked for is copied, also after splitting and shuffling."""
    path = tmp_path / "big.npy"
    full = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(50_000, 1000))
    full[:, 0] = np.arange(50_000) % 251
    full.flush()
    splits = data.load(path, seed=3)
    assert isinstance(splits.train.arrays[0], data.sources.MappedRows)
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (40_000, 5000, 5000)
    source = as_source(splits.train)
    (batch,) = source.rows(torch.tensor([5, 39_999]))
    order = np.random.default_rng(3).permutation(50_000)
    assert batch[:, 0].tolist() == [order[5] % 251, order[39_999] % 251]
    everything = torch.cat([b[0][:, 0] for _, b in source.all()])
    np.testing.assert_array_equal(everything.numpy(), order[:40_000] % 251)


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (np.zeros((0, 3)), "at least one row"),
        ((np.zeros((3, 2)), np.zeros(4)), r"data\[1\]: expected 3 rows"),
        (np.array(["a", "b"]), "real numbers; got dtype <U1"),
        (np.array([1j]), "real numbers"),
        (torch.zeros(2, dtype=torch.complex64), "real numbers"),
        (np.array([None, 1]), "real numbers; got dtype object"),
        (3.0, "one row a datum"),
        (TensorDataset(torch.zeros(0, 2)), "at least one row"),
    ],
)
def test_what_is_refused(thing: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        as_source(thing)


def test_a_view_backwards() -> None:
    """Torch has no negative strides."""
    x = np.arange(12.0).reshape(4, 3)[::-1]
    (batch,) = as_source(x).rows(torch.tensor([0]))
    assert batch[0].tolist() == [9.0, 10.0, 11.0]


def test_a_bad_row_is_named_as_in_its_file(tmp_path: Path) -> None:
    """The splits are shuffled; the message says where to look."""
    x = np.random.default_rng(0).random((50, 3))
    x[17, 1] = np.nan
    for name in ("x.npy", "x.npz"):
        (np.save if name == "x.npy" else np.savez)(tmp_path / name, x)
        splits = data.load(tmp_path / name, seed=1)
        parts = [as_source(getattr(splits, part)) for part in ("train", "valid", "test")]
        messages = []
        for part in parts:
            try:
                data.check_rows(part)
            except DataError as error:
                messages.append(str(error))
        assert len(messages) == 1
        assert messages[0].startswith("data, row 17:")


def test_iterable_datasets_need_a_loader_with_a_length() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter([torch.zeros(2)])

    with pytest.raises(DataError, match="map-style"):
        as_source(Stream())
    with pytest.raises(DataError, match="a length"):
        as_source(DataLoader(Stream()))


def test_a_dataset_of_dicts_is_refused() -> None:
    class Dicts(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"x": torch.zeros(2)}

    with pytest.raises(DataError, match="tuples of tensors"):
        as_source(Dicts()).rows(torch.tensor([0]))


def test_batched_fetching_is_used_where_a_dataset_has_it() -> None:
    class Fetching(torch.utils.data.Dataset):
        calls = 0

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> torch.Tensor:
            raise AssertionError("one by one")

        def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
            self.calls += 1
            return [torch.tensor([float(i)]) for i in indices]

    dataset = Fetching()
    (batch,) = as_source(dataset).rows(torch.tensor([4, 1]))
    assert batch.flatten().tolist() == [4.0, 1.0]
    assert dataset.calls == 1


def test_check_rows_names_the_first_bad_row() -> None:
    x = np.zeros((5000, 3))
    x[4321, 1] = np.inf
    with pytest.raises(DataError, match=r"data, row 4321: expected finite values; got inf"):
        data.check_rows(as_source(x))
    y = np.zeros((10, 2))
    y[7] = 0.5
    with pytest.raises(DataError, match=r"row 7: expected zeros; got 0\.5 \(2 such"):
        data.check_rows(as_source(y), {0: data.Support(lambda v: v == 0, "zeros")})


# Binarisation


def grey(n: int = 600, d: int = 40) -> np.ndarray:
    return np.tile(np.linspace(0, 1, d, dtype=np.float32), (n, 1))


def test_dynamic_binarisation_is_redrawn_and_reproducible(device: torch.device) -> None:
    source = as_source(Data((grey(),), binarize="dynamic"), device)
    batches = Batches(source, 100, seed=1, shuffle=False)
    first = torch.cat([b[0] for b in batches.epoch(0)])
    again = torch.cat([b[0] for b in batches.epoch(0)])
    later = torch.cat([b[0] for b in batches.epoch(1)])
    resumed = torch.cat([b[0] for b in batches.epoch(0, start=3)])
    assert torch.equal(first, again)
    assert torch.equal(first[300:], resumed)
    assert not torch.equal(first, later)
    assert set(first.unique().tolist()) == {0.0, 1.0}
    # Column means are Bernoulli(p): 5.5 standard errors over 40 columns, 40 * 4e-8 < 1e-5.
    p = torch.linspace(0, 1, 40, device=device)
    error = (p * (1 - p) / 600).sqrt() + 1e-12
    assert bool(((first.mean(0) - p).abs() <= 5.5 * error).all())


def test_evaluation_sees_one_fixed_draw_whatever_the_chunks(device: torch.device) -> None:
    source = as_source(Data((grey(),), binarize="dynamic"), device)
    whole = torch.cat([b[0] for _, b in source.all(600)])
    parts = torch.cat([b[0] for _, b in source.all(37)])
    assert torch.equal(whole, parts)


def test_static_and_threshold_binarisation(device: torch.device) -> None:
    static = Data((grey(),), binarize="static", seed=5)
    a, b = (torch.cat([x[0] for _, x in as_source(static, device).all()]) for _ in range(2))
    assert torch.equal(a, b)
    other = Data((grey(),), binarize="static", seed=6)
    assert not torch.equal(a, next(as_source(other, device).all())[1][0])
    hard = as_source(Data((grey() * 255,), 1 / 255, "threshold"), device)
    (x,) = hard.rows(torch.tensor([0], device=device))
    assert x[0].tolist() == [0.0] * 20 + [1.0] * 20


def test_values_outside_the_unit_interval_arent_binarised() -> None:
    with pytest.raises(DataError, match=r"values in \[0, 1\].*scaling by 1.*to 255"):
        as_source(Data((grey() * 255,), binarize="dynamic"))
    with pytest.raises(ArgumentError, match="'none', 'threshold'"):
        Data((grey(),), binarize="sometimes")  # type: ignore[arg-type]


# Readers


def write_idx(path: Path, array: np.ndarray) -> None:
    kinds = {"uint8": 8, "int32": 0x0C, "float32": 0x0D}
    head = bytes([0, 0, kinds[array.dtype.name], array.ndim])
    content = head + struct.pack(f">{array.ndim}I", *array.shape)
    content += array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
@pytest.mark.parametrize("name", ["a-idx3-ubyte", "a-idx3-ubyte.gz"])
def test_idx_round_trip(dtype: str, name: str, tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    write_idx(tmp_path / name, array)
    found = data.read_idx(tmp_path / name)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a-idx3-ubyte"
    write_idx(path, np.zeros((2, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="expected 6 bytes of data for shape"):
        data.read_idx(path)
    path.write_bytes(b"\x89PNG....")
    with pytest.raises(DataError, match="an IDX file"):
        data.read_idx(path)
    path.write_bytes(gzip.compress(bytes(100))[:12])
    with pytest.raises(DataError, match="a readable IDX file"):
        data.read_idx(path)
    with pytest.raises(DataError, match="No such file"):
        data.read_idx(tmp_path / "nothing")


def mnist_like(folder: Path, n: int = 40) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, size in (("train", n), ("t10k", 10)):
        images = rng.integers(0, 256, (size, 5, 4)).astype(np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(size, dtype=np.uint8) % 10)


def test_the_mnist_family_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist_like(tmp_path / "mnist")
    splits = data.load("mnist", tmp_path)
    assert splits.event_shape == (1, 5, 4)
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (36, 4, 10)
    assert splits.levels == 256
    monkeypatch.setenv("PVAE_DATA", str(tmp_path))
    dynamic = data.load("mnist", binarize="dynamic")
    assert (dynamic.train.binarize, dynamic.test.binarize) == ("dynamic", "static")
    assert dynamic.levels == 2
    (x, y) = as_source(dynamic.train).rows(torch.arange(3))
    assert set(x.unique().tolist()) <= {0.0, 1.0}
    assert y.dtype == torch.int64


def test_a_missing_data_set_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"PVAE_DATA=DIR[\s\S]*--download"):
        data.load("mnist", tmp_path)
    with pytest.raises(DataError, match=r"one of digits, mnist.*or a file"):
        data.load("mnits")


def test_digits_are_counts_of_a_block() -> None:
    splits = data.load("digits", valid=350, test=447, shuffle=False)
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (1000, 350, 447)
    assert splits.levels == 17
    x = splits.train.arrays[0]
    assert (x.min(), x.max()) == (0, 16)
    content = np.concatenate([s.arrays[0] for s in (splits.train, splits.valid, splits.test)])
    digest = hashlib.md5(content.astype(np.uint8).tobytes(), usedforsecurity=False).hexdigest()
    assert digest == "fa70cba135d4cdd4cde65da70dbffde2"  # in order, and nothing lost


def test_splits_dont_overlap_and_follow_the_seed(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100.0)[:, None])
    parts = data.load(tmp_path / "x.npy", valid=0.2, test=10, seed=4)
    found = [np.asarray(s.arrays[0]).flatten() for s in (parts.train, parts.valid, parts.test)]
    assert [len(f) for f in found] == [70, 20, 10]
    assert sorted(np.concatenate(found)) == list(range(100))
    again = data.load(tmp_path / "x.npy", valid=0.2, test=10, seed=4)
    np.testing.assert_array_equal(found[1], np.asarray(again.valid.arrays[0]).flatten())
    with pytest.raises(ArgumentError, match="fewer rows than the 100"):
        data.load(tmp_path / "x.npy", test=100)


def test_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((30, 4)), np.arange(30)
    np.savez(tmp_path / "xy.npz", x=x, y=y)
    splits = data.load(tmp_path / "xy.npz")
    assert len(splits.train.arrays) == 2
    assert splits.levels is None
    np.savez(tmp_path / "parts.npz", train=x, valid=x[:5], test=x[:7])
    splits = data.load(tmp_path / "parts.npz")
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (30, 5, 7)
    np.savez(tmp_path / "images.npz", rng.integers(0, 256, (30, 6, 5)).astype(np.uint8))
    splits = data.load(tmp_path / "images.npz")
    assert (splits.event_shape, splits.levels) == ((1, 6, 5), 256)
    np.save(tmp_path / "bits.npy", rng.integers(0, 2, (30, 4)))
    assert data.load(tmp_path / "bits.npy").levels == 2  # whatever their type
    np.save(tmp_path / "last.npy", rng.random((30, 6, 5, 3)))
    with pytest.raises(DataError, match=r"(?s)channels first.*np\.moveaxis\(x, -1, 1\)"):
        data.load(tmp_path / "last.npy")
    np.savez(tmp_path / "odd.npz", a=x, b=x)
    with pytest.raises(DataError, match=r"an array 'x'.*got a, b"):
        data.load(tmp_path / "odd.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"bad\.npz: expected a file of numbers"):
        data.load(tmp_path / "bad.npz")
    np.save(tmp_path / "pickled.npy", np.array([{}, {}], dtype=object))
    with pytest.raises(DataError, match=r"real numbers; got dtype object, which would run code"):
        data.load(tmp_path / "pickled.npy")


# Downloads


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A loopback server of a folder."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}/", folder
    found.shutdown()
    found.server_close()
    thread.join()


def test_downloads_are_checked(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pooch", reason="pooch is an extra")
    url, folder = server
    mnist_like(tmp_path / "made")
    sums = []
    for name in remote.FILES:
        source = tmp_path / "made" / name
        if not source.exists():
            source = source.with_suffix("")
        content = source.read_bytes()
        (folder / name).write_bytes(content)
        sums.append(hashlib.md5(content, usedforsecurity=False).hexdigest())
    monkeypatch.setitem(remote.REMOTE, "mnist", (url, tuple(sums)))
    splits = data.load("mnist", tmp_path / "data", fetch=True)
    assert len(splits.test) == 10
    (folder / remote.FILES[0]).unlink()
    data.download("mnist", tmp_path / "data")  # what is there isn't fetched again
    with pytest.raises(DataError, match="a file with MD5 sum"):
        data.download("mnist", tmp_path / "elsewhere")


def test_a_wrong_download_takes_nobodys_place(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pooch", reason="pooch is an extra")
    url, folder = server
    for name in remote.FILES:
        (folder / name).write_bytes(b"something else")
    monkeypatch.setitem(remote.REMOTE, "kmnist", (url, ("0" * 32,) * 4))
    with pytest.raises(DataError, match="a file with MD5 sum 0000"):
        data.download("kmnist", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.gz"))
    with pytest.raises(ArgumentError, match="one of mnist"):
        data.download("imagenet", tmp_path)


@pytest.mark.skipif(not SHARED, reason="PVAE_DATA doesn't name a folder with MNIST")
def test_real_files() -> None:
    assert SHARED is not None
    splits = data.load("mnist", SHARED)
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (54_000, 6000, 10_000)
    static = data.load("static_mnist", SHARED)
    assert [len(s) for s in (static.train, static.valid, static.test)] == [50_000, 10_000, 10_000]
    assert data.load("freyfaces", SHARED).event_shape == (1, 28, 20)


def test_an_array_alone_is_data_without_labels() -> None:
    x = np.arange(12.0).reshape(4, 3)
    for array in (x, torch.as_tensor(x)):
        alone = data.Data(array)
        assert (len(alone), alone.event_shape, len(alone.arrays)) == (4, (3,), 1)
