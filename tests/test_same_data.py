"""A training goes on with the rows that it began with, in the order that it would have had."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import pvae
from pvae import VAE, checkpoint, data, fitting
from pvae.errors import CheckpointError, PvaeWarning
from tests.fits import D, N, Q, binary, same, state

pytestmark = pytest.mark.usefixtures("store")


def vae(**options: Any) -> VAE:
    torch.manual_seed(0)
    return pvae.recipes.vae(D, Q, hidden=(8,), likelihood="gaussian", **options)


def train(pair: pvae.Pair, source: Any, folder: Path, **options: Any) -> pvae.Fit:
    settings = {"epochs": 1, "progress": False, "engine": "eager", "resume": True}
    return pvae.fit(pair, source, folder=folder, **{**settings, **options})


class Items(Dataset):
    """Rows of a user's own data set."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


class Stream(IterableDataset):
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows)


def memmap(rows: Tensor, folder: Path) -> np.memmap:
    path = folder / f"{len(list(folder.iterdir()))}.npy"
    np.save(path, rows.numpy())
    return np.load(path, mmap_mode="r")


MAKES: dict[str, Callable[[Tensor, Path], Any]] = {
    "tensor": lambda x, _: x,
    "array": lambda x, _: x.numpy(),
    "single precision": lambda x, _: x.float(),
    "memory map": memmap,
    "bytes": lambda x, _: data.Data(((x * 255).byte(),), scale=1 / 255),
    "dynamic": lambda x, _: data.Data((x.numpy(),), binarize="dynamic"),
    "tensors": lambda x, _: TensorDataset(x),
    "data set": lambda x, _: Items(x),
    "subset": lambda x, _: Subset(Items(torch.cat([x, x])), range(len(x))),
    "loader": lambda x, _: DataLoader(TensorDataset(x), batch_size=16),
    "loader of items": lambda x, _: DataLoader(Items(x), batch_size=16, shuffle=True),
    "stream": lambda x, _: DataLoader(Stream(x), batch_size=16),
}


@pytest.mark.parametrize("name", MAKES)
def test_one_other_row_is_refused_and_the_same_rows_are_taken(name: str, tmp_path: Path) -> None:
    """A number in the middle, in training and in validation data."""
    files = tmp_path / "files"
    files.mkdir()
    make, x, y = MAKES[name], binary(), binary(30)
    other, later = x.clone(), y.clone()
    other[N // 2, 1], later[17, 3] = 1 - other[N // 2, 1], 1 - later[17, 3]
    train(vae(), make(x, files), tmp_path / "run", valid=make(y, files))
    with pytest.raises(CheckpointError, match=r"data: saved .*, now "):
        train(vae(), make(other, files), tmp_path / "run", epochs=2, valid=make(y, files))
    with pytest.raises(CheckpointError, match=r"valid: saved .*, now "):
        train(vae(), make(x, files), tmp_path / "run", epochs=2, valid=make(later, files))
    with pytest.raises(CheckpointError, match=r"valid: saved .*, now None"):
        train(vae(), make(x, files), tmp_path / "run", epochs=2)
    train(vae(), make(x, files), tmp_path / "run", epochs=2, valid=make(y, files))


def test_what_holds_the_rows_is_no_matter(tmp_path: Path) -> None:
    x = binary()
    train(vae(), x, tmp_path / "run", batch_size=16)
    files = tmp_path / "files"
    files.mkdir()
    for epochs, source in enumerate((x.numpy(), memmap(x, files), x.clone(), x.float()), start=2):
        train(vae(), source, tmp_path / "run", epochs=epochs, batch_size=16)


def test_large_data_are_read_in_blocks_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = binary(1000)
    row = x[0].nbytes
    monkeypatch.setattr(fitting.fingerprint, "LIMIT", 128 * row)
    monkeypatch.setattr(fitting.fingerprint, "ITEMS", 128)
    first, last, unread = x.clone(), x.clone(), x.clone()
    first[0], last[-1], unread[3] = 1 - x[0], 1 - x[-1], 1 - x[3]
    for make in (MAKES["tensor"], MAKES["data set"], MAKES["memory map"]):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        train(vae(), make(x, folder), folder, batch_size=500)
        for other in (first, last):
            with pytest.raises(CheckpointError, match="of 128 of 1000 rows, in 64 blocks, now"):
                train(vae(), make(other, folder), folder, epochs=2, batch_size=500)
        train(vae(), make(unread, folder), folder, epochs=2, batch_size=500)


def test_labels_and_kinds_are_data_too(tmp_path: Path) -> None:
    x, y = binary(), torch.arange(N) % 3
    train(vae(num_classes=3), (x, y), tmp_path / "labels")
    with pytest.raises(CheckpointError, match="data: saved"):
        train(vae(num_classes=3), (x, y.flip(0)), tmp_path / "labels", epochs=2)
    few = binary(20)
    kinds = {"one": x, "two": few}
    train(vae(), kinds, tmp_path / "kinds", batch_size=10)
    with pytest.raises(CheckpointError, match="data of two: saved"):
        train(vae(), {"one": x, "two": 1 - few}, tmp_path / "kinds", epochs=2, batch_size=10)
    train(vae(), kinds, tmp_path / "kinds", epochs=2, batch_size=10)


# Rows that are drawn


class Augmented(Items):
    """Rows with noise from a generator: the process's, or one of the data set's own."""

    def __init__(self, rows: Tensor, kind: str) -> None:
        super().__init__(rows)
        self.kind = kind
        self.own = {
            "torch's own": lambda: torch.Generator().manual_seed(3),
            "numpy's own": lambda: np.random.default_rng(3),
            "old numpy's own": lambda: np.random.RandomState(3),
            "mersenne twister": lambda: np.random.Generator(np.random.MT19937(3)),
            "python's own": lambda: random.Random(3),  # noqa: S311
        }.get(kind, lambda: None)()

    def __getitem__(self, index: int) -> Tensor:
        own: Any = self.own
        if self.kind == "torch's own":
            noise = torch.rand((), generator=own)
        elif self.kind == "old numpy's own":
            noise = torch.tensor(own.random_sample())
        elif own is not None:
            noise = torch.tensor(own.random())
        else:
            noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002, S311
        return (self.rows[index] + noise) / 4


DRAWING = ("process's", "torch's own", "numpy's own", "old numpy's own", "mersenne twister",
           "python's own")  # fmt: skip


@pytest.mark.parametrize("kind", DRAWING)
def test_a_data_set_that_draws_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole, parts, again = vae(), vae(), vae()
    options: dict[str, Any] = {"batch_size": 16, "valid": binary(9)}
    train(whole, Augmented(binary(), kind), tmp_path / "whole", epochs=4, **options)
    train(parts, Augmented(binary(), kind), tmp_path / "parts", epochs=2, **options)
    train(again, Augmented(binary(), kind), tmp_path / "parts", epochs=4, **options)
    assert same(state(again), state(whole))
    if kind != "process's":  # another one whose generators have moved isn't other data
        moved = Augmented(binary(), kind)
        _ = [moved[i] for i in range(7)]
        train(vae(), moved, tmp_path / "parts", epochs=5, **options)
    with pytest.raises(CheckpointError, match="data: saved"):
        train(vae(), Augmented(1 - binary(), kind), tmp_path / "parts", epochs=6, **options)


def test_reading_for_the_fingerprint_takes_nothing_from_generators(tmp_path: Path) -> None:
    """Trainings with and without a folder, for which alone data are read, are the same."""
    one, other = vae(), vae()
    for kind in DRAWING:
        pvae.fit(one, Augmented(binary(), kind), epochs=2, progress=False, engine="eager")
        train(other, Augmented(binary(), kind), tmp_path / kind, epochs=2)
        assert same(state(one), state(other))


def test_saving_leaves_the_generators_of_a_data_set_as_they_are(tmp_path: Path) -> None:
    data = Augmented(binary(), "torch's own")
    run = pvae.fit(vae(), data, epochs=1, progress=False, engine="eager")
    own: Any = data.own
    run.save(tmp_path / "a")
    torch.rand(3, generator=own)
    before = own.get_state()
    run.save(tmp_path / "b")
    assert torch.equal(own.get_state(), before)
    one, other = (checkpoint.load(tmp_path / name).meta["own"] for name in "ab")
    assert one == other  # where the training left it


def test_rows_that_are_others_at_each_read_are_counted(tmp_path: Path) -> None:
    class Counting(Items):
        reads = itertools.count()

        def __getitem__(self, index: int) -> Tensor:
            return self.rows[index] / (2 + next(self.reads) % 7)

    train(vae(), Counting(binary()), tmp_path)
    train(vae(), Counting(binary()), tmp_path, epochs=2)
    with pytest.raises(CheckpointError, match="num_rows: saved 40, now 41"):
        train(vae(), Counting(binary(41)), tmp_path, epochs=3)


# Ctrl-C within an epoch of a loader


class Backwards(Sampler):
    """A sampler of one's own, which begins at another row in each pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter([(i + 7 * self.passes) % N for i in range(N)])


class Drawn(Sampler):
    """A sampler of one's own that draws from the process's generator."""

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(N).tolist())


def loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(binary()), **{"batch_size": 8, **options})


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


LOADERS: dict[str, Callable[[], DataLoader]] = {
    "shuffled": lambda: loader(shuffle=True),
    "in order": loader,
    "own generator": lambda: loader(shuffle=True, generator=seeded()),
    "replacement": lambda: loader(sampler=RandomSampler(range(N), replacement=True)),
    "sampler's generator": lambda: loader(
        sampler=RandomSampler(range(N), replacement=True, generator=seeded())
    ),
    "subset": lambda: loader(sampler=SubsetRandomSampler(range(0, N, 2))),
    "weights": lambda: loader(sampler=WeightedRandomSampler(torch.rand(N).tolist(), N)),
    "drawn": lambda: loader(sampler=Drawn()),
    "stream": lambda: DataLoader(Stream(binary()), batch_size=8),
    "augmented": lambda: DataLoader(Augmented(binary(), "process's"), 8, shuffle=True),
    "augmented by its own": lambda: DataLoader(Augmented(binary(), "numpy's own"), 8, shuffle=True),
    "workers": lambda: DataLoader(
        Augmented(binary(), "process's"), 8, shuffle=True, num_workers=1,
        multiprocessing_context="fork",
    ),
}  # fmt: skip


def stopped_within_an_epoch(make: Callable[[], DataLoader], folder: Path) -> tuple[VAE, VAE]:
    """A training that was never stopped, and one that Ctrl-C stopped in its second epoch."""

    def pair(stop: int | None) -> VAE:
        made, steps = vae(), itertools.count()

        def press(module: Any, inputs: Any, output: Any) -> None:
            if module.training and torch.is_grad_enabled() and next(steps) == stop:
                os.kill(os.getpid(), signal.SIGINT)

        made.guide.posterior.register_forward_hook(press)
        return made

    whole, first, again = pair(None), pair(7), pair(None)
    torch.manual_seed(1)
    train(whole, make(), folder / "whole", epochs=4)
    torch.manual_seed(1)
    run = train(first, make(), folder / "parts", epochs=4)
    assert run.interrupted
    assert 0 < run.progress.step < run.training.steps_per_epoch
    torch.manual_seed(1)
    train(again, make(), folder / "parts", epochs=4)
    return whole, again


@pytest.mark.parametrize("name", LOADERS)
def test_ctrl_c_within_an_epoch_of_a_loader_is_no_matter(name: str, tmp_path: Path) -> None:
    whole, again = stopped_within_an_epoch(LOADERS[name], tmp_path)
    assert same(state(again), state(whole))


def test_an_order_that_cant_be_repeated_is_said(tmp_path: Path) -> None:
    with pytest.warns(PvaeWarning, match="rows come in another order"):
        stopped_within_an_epoch(lambda: loader(sampler=Backwards()), tmp_path)


def test_more_epochs_after_ctrl_c_in_the_same_process(tmp_path: Path) -> None:
    whole, parts, steps = vae(), vae(), itertools.count()

    def press(module: Any, inputs: Any, output: Any) -> None:
        if module.training and torch.is_grad_enabled() and next(steps) == 7:
            os.kill(os.getpid(), signal.SIGINT)

    parts.guide.posterior.register_forward_hook(press)
    train(whole, loader(shuffle=True), tmp_path / "whole", epochs=4)
    run = train(parts, loader(shuffle=True), tmp_path / "parts", epochs=4)
    run.save(tmp_path / "elsewhere.safetensors")
    run.refine(3)
    assert same(state(parts), state(whole))
