"""Loaders, data sets and streams: the checks that arrays get, batch by batch, and rows in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import pvae
from pvae import VAE, bounds, guides, latent, likelihoods, priors, recipes
from pvae.data import LinearGaussian, as_source
from pvae.errors import ArgumentError, DataError, PairError, PvaeWarning
from pvae.networks import MLP
from tests import linear
from tests.fits import D, binary, same, state, vae

pytestmark = pytest.mark.usefixtures("store")

fit = functools.partial(pvae.fit, progress=False, engine="eager")


def loader(*arrays: Tensor, batch_size: int = 10, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*arrays), batch_size, **options)


# Global latents


def normal_mean(full_size: int | None) -> Any:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", full_size or len(x), subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    return model, AutoNormal(model)


def test_a_global_latent_beside_a_loader_needs_the_full_size() -> None:
    """The posterior's sd is 60 ** -0.5; batches of 20 that count as all data give 20 ** -0.5."""
    x = torch.randn(60) + 2
    batches = loader(x, batch_size=20, shuffle=True)
    with pytest.raises(PairError, match=r"(?s)plate that knows the full size.*'data', 60") as error:
        fit(normal_mean(None), batches, epochs=1)
    assert "loader.dataset as the data, and batch_size=None" in str(error.value)
    pair, exact = normal_mean(60), normal_mean(60)
    pyro.clear_param_store()
    fit(pair, batches, epochs=1)
    pyro.clear_param_store()
    fit(exact, x, epochs=1, batch_size=None)
    with torch.no_grad():  # the posterior: the bound of all rows is the evidence of all
        exact[1].locs.mu.fill_(float(x.sum() / 60.01))
        exact[1].scales.mu = torch.tensor(60.01**-0.5)
    whole = dist.MultivariateNormal(torch.zeros(60), torch.eye(60) + 100.0).log_prob(x)
    assert bounds.elbo(exact, batches).mean == pytest.approx(float(whole) / 60, abs=1e-8)
    pyro.clear_param_store()
    with pytest.warns(PvaeWarning, match=r"'data', 80, .* 60 that there are: .* of 80 such data"):
        fit(normal_mean(80), batches, epochs=1)


# Rows that parameters belong to


def tied(x: Tensor) -> Any:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return model, AutoNormal(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 20, "shuffle": True}, "another order in each epoch"),
        ({"batch_size": 10}, "batches of 10"),
        (
            {"batch_sampler": BatchSampler(RandomSampler(range(20)), 20, drop_last=False)},
            "another order",
        ),
        ({"batch_sampler": BatchSampler(range(20), 10, drop_last=False)}, "batches of 10"),
    ],
)
def test_parameters_of_single_rows_refuse_a_loader_of_others(options: Any, words: str) -> None:
    x = torch.randn(20, 2)
    if "batch_sampler" in options:
        options = {"batch_size": 1, **options}
    with pytest.raises(PairError, match=words):
        fit(tied(x), DataLoader(TensorDataset(x), **options), epochs=1)


def test_parameters_of_single_rows_take_all_rows_in_order() -> None:
    x = torch.randn(20, 2)
    far, found = x.abs() > 1, []
    for data in (loader(x, batch_size=20), x):
        pair = tied(x)
        fit(pair, data, epochs=3, lr=0.1)
        sign = pair[1].locs.z.sign()  # of a row's mean: its datum's there, whatever the draws
        assert torch.equal(sign[far], x.sign()[far])
        found.append(bounds.elbo(pair, data, 300).mean)
        pyro.clear_param_store()
    assert found[0] == pytest.approx(found[1], abs=0.1)
    x = torch.randn(256, 2)  # a look is at 128 rows
    fit(pair := tied(x), x[:128], epochs=1, batch_size=None)
    with pytest.raises(PairError, match="the 128 rows that the pair's parameters belong to"):
        bounds.elbo(pair, x)


def test_the_guide_of_a_plate_with_an_index_follows_it_or_is_refused() -> None:
    """AutoNormal sets a plate of its own for the model's ``subsample=``: z's row is its place."""
    size = 30
    index, x = torch.arange(size), torch.linspace(-5, 5, size)[:, None] + torch.zeros(size, 4)

    def model(index: Tensor, x: Tensor) -> None:
        with pyro.plate("data", size, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(z[:, None], 0.1).to_event(1), obs=x)

    def knowing(guide: AutoNormal) -> Any:
        fit((model, guide), (index, x), epochs=1, batch_size=10 if guide.create_plates else None)
        with torch.no_grad():
            guide.locs.z.copy_(x[:, 0])
            guide.scales.z = torch.full((size,), 0.05)
        return model, guide

    pair = knowing(AutoNormal(model))
    order = torch.randperm(size)
    bound = bounds.elbo(pair, (index, x)).mean
    assert bound > -10
    with pytest.raises(PairError, match=r"don't follow pyro\.plate") as error:
        bounds.elbo(pair, (index[order], x[order]))
    assert "index.argsort()" in str(error.value)
    back = index[order].argsort()
    assert bounds.elbo(pair, (index[order][back], x[order][back])).mean == bound
    pyro.clear_param_store()
    with pytest.raises(PairError, match=r"AutoNormal\(model, create_plates=lambda"):
        fit((model, AutoNormal(model)), (index[:10], x[:10]), batch_size=None)

    def plates(*batch: Tensor) -> Any:
        return pyro.plate("data", size, dim=-1, subsample=batch[0])

    pyro.clear_param_store()
    pair = knowing(AutoNormal(model, create_plates=plates))
    some = order[:10]
    assert bounds.elbo(pair, (index[some], x[some])).mean > -10
    with pytest.raises(PairError, match="don't follow"):
        bounds.elbo(pair, (index[order], x[order]))


# Values, batch by batch


@pytest.mark.parametrize(
    ("value", "words"), [(0.5, "support of site 'x'"), (float("nan"), "finite values")]
)
def test_every_batch_of_a_loader_is_checked_before_its_step(value: float, words: str) -> None:
    """Of 60 rows in 6 batches the fifth has one that can't be: the first four steps stand."""
    x, good, bad = binary(60), vae(), vae()
    x[43, 1] = value
    with pytest.raises(DataError, match="epoch 0, data, row 3 of batch 4: expected") as error:
        fit(bad, loader(x), epochs=3)
    assert words in str(error.value)
    fit(good, loader(x[:40]), epochs=1)
    assert same(state(good), state(bad))
    with pytest.raises(DataError, match="data, row 3 of batch 4: expected"):
        bounds.elbo(good, loader(x))


class Turning(Dataset):
    """Rows that are fine until so many have been read, as a random transformation's may be."""

    def __init__(self, x: Tensor, good: int, value: float) -> None:
        self.x, self.left, self.value = x, good, value

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> Tensor:
        self.left -= 1
        return self.x[row] if self.left >= 0 else torch.full_like(self.x[row], self.value)


def test_a_data_sets_later_items_are_checked_too() -> None:
    dataset = Turning(binary(40), 40 + 128, 0.5)
    with pytest.raises(DataError, match=r"data, row \d+: expected values in the support"):
        fit(vae(), dataset, epochs=9, batch_size=10)


def test_each_observed_entry_is_checked() -> None:
    """Labels that a site observes, not only the data in the first place."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Categorical(logits=z[:, None] * torch.arange(3.0)), obs=y)

    weight = nn.Parameter(torch.tensor(0.5))

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor, y: Tensor) -> None:
            pyro.module("guide", self)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.weight * x, 0.7))

    x, y = torch.randn(200), torch.arange(200) % 3
    y[150] = -1
    with pytest.raises(DataError, match=r"data\[1\], row 150: expected .* site 'y'"):
        fit((model, Guide()), (x, y), epochs=1)
    with pytest.raises(DataError, match=r"epoch 0, data\[1\], row 0 of batch 15"):
        fit((model, Guide()), loader(x, y), epochs=1)


# Loaders without batches, with a short last one, or read once


def test_a_loader_without_a_batch_says_why() -> None:
    with pytest.raises(DataError, match=r"40 rows, batches of 128, and drop_last=True"):
        fit(vae(), loader(binary(40), batch_size=128, drop_last=True))
    with pytest.raises(DataError, match="at least one row"):
        as_source(DataLoader(TensorDataset(torch.zeros(0, D)), batch_size=4))


def test_a_loaders_last_row_alone_is_refused_with_batch_norm() -> None:
    torch.manual_seed(0)
    normed = nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, 4))
    pair = VAE(
        priors.StandardNormal(2), likelihoods.Bernoulli(MLP(2, D), D), guides.MeanField(normed, 2)
    )
    with pytest.raises(ArgumentError, match="a single row") as error:
        fit(pair, loader(binary(31)), epochs=1)
    assert "drop_last=True in the DataLoader" in str(error.value)
    run = fit(pair, loader(binary(31), drop_last=True), epochs=1)
    assert run.progress.global_step == 3


class Stream(IterableDataset):
    def __init__(self, rows: Any, length: int) -> None:
        self.rows, self.length = rows, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows)


def test_a_stream_that_can_be_read_once_is_refused() -> None:
    """Its first look would take the first batch away, and the second epoch would be empty."""
    with pytest.raises(DataError, match=r"starts anew at each pass.*list_iterator"):
        fit(vae(), DataLoader(Stream(iter([*binary(40)]), 40), batch_size=10))
    with pytest.raises(DataError, match="read more than once; got a generator"):
        fit(vae(), (row for row in binary(40)))
    run = fit(vae(), DataLoader(Stream([*binary(40)], 40), batch_size=10), epochs=2)
    assert run.progress.global_step == 8


def test_a_stream_shorter_than_its_length_is_said() -> None:
    with pytest.warns(PvaeWarning, match=r"Epoch 0 had 3 batch\(es\) where the data promise 4"):
        fit(vae(), DataLoader(Stream([*binary(30)], 40), batch_size=10), epochs=1)


def test_batches_without_an_axis_of_rows_are_refused() -> None:
    with pytest.raises(DataError, match="single rows"):
        fit(vae(), loader(binary(40), batch_size=None))  # type: ignore[arg-type]
    made = [(binary(40)[i : i + 10],) for i in range(0, 40, 10)]  # the items are batches
    source = as_source(DataLoader(made, batch_size=None))  # type: ignore[arg-type]
    assert source.num_rows == 40
    run = fit(vae(), DataLoader(made, batch_size=None), epochs=1)  # type: ignore[arg-type]
    assert run.progress.global_step == 4


def test_a_batch_size_beside_a_loader_is_refused() -> None:
    batches = loader(binary(40))
    for size in (25, 128, None):
        with pytest.raises(ArgumentError, match="the DataLoader's own"):
            fit(vae(), batches, batch_size=size)
    for own in (10, "auto"):
        assert fit(vae(), batches, batch_size=own, epochs=1).progress.global_step == 4


# Results by datum


class Backwards(Sampler):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(reversed(range(self.size)))

    def __len__(self) -> int:
        return self.size


class Shuffling(Backwards):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size).tolist())


def rows(x: Tensor, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(x), **options)


SOME = [30, 4, 17, 2, 25]
ORDERS: dict[str, tuple[Any, Any]] = {
    "in order": (lambda x: rows(x, batch_size=10), slice(None)),
    "a sampler in order": (
        lambda x: rows(x, batch_size=10, sampler=SequentialSampler(x)),
        slice(None),
    ),
    "shuffled": (lambda x: rows(x, batch_size=10, shuffle=True), slice(None)),
    "a subset": (lambda x: rows(x, batch_size=2, sampler=SubsetRandomSampler(SOME)), SOME),
    "backwards": (lambda x: rows(x, batch_size=10, sampler=Backwards(40)), slice(None, None, -1)),
    "a list": (lambda x: rows(x, batch_size=2, sampler=SOME), SOME),
    "batches, shuffled": (
        lambda x: rows(x, batch_sampler=BatchSampler(RandomSampler(x), 7, drop_last=True)),
        slice(None),
    ),
    "batches of a list": (lambda x: rows(x, batch_sampler=[SOME[:2], SOME[2:]]), SOME),
    "batches as items": (
        lambda x: rows(
            x, batch_size=None, sampler=BatchSampler(RandomSampler(x), 7, drop_last=False)
        ),
        slice(None),
    ),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_results_come_in_the_datas_order(kind: str) -> None:
    """log p(x) in closed form, row by row; the codes, which are the posterior's means."""
    toy = LinearGaussian.random(5, 2)
    x = toy.sample(40)
    pair = linear.pair(toy, linear.exact)
    make, index = ORDERS[kind]
    expected = x.numpy()[index]
    expected = torch.from_numpy(np.ascontiguousarray(expected))
    found = bounds.evidence(pair, make(x), 5)
    torch.testing.assert_close(found.values, toy.log_evidence(expected), rtol=0, atol=1e-8)
    codes = latent.codes(pair, make(x))
    torch.testing.assert_close(codes, toy.posterior(expected)[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": WeightedRandomSampler([0.1] * 40, 40)},
        {"sampler": RandomSampler(range(40), replacement=True)},
        {"sampler": Shuffling(40)},
        {"batch_sampler": BatchSampler(Shuffling(40), 10, drop_last=False)},
    ],
    ids=["weights", "replacement", "custom", "custom batches"],
)
def test_rows_in_no_order_that_repeats_are_refused(options: Any) -> None:
    toy = LinearGaussian.random(5, 2)
    x = toy.sample(40)
    pair = linear.pair(toy, linear.exact)
    odd = DataLoader(TensorDataset(x), **options)
    with pytest.raises(DataError, match="order is the same at each pass") as error:
        bounds.evidence(pair, odd, 5)
    assert "loader.dataset" in str(error.value)
    found = bounds.evidence(pair, odd.dataset, 5)
    torch.testing.assert_close(found.values, toy.log_evidence(x), rtol=0, atol=1e-8)
    with pytest.raises(DataError, match="order is the same"):
        fit(recipes.vae(5, 2, hidden=(4,), likelihood="gaussian"), x, valid=odd, epochs=1)


# Parameters of rows that a program cuts to the batch


def cut_to(x: Tensor, loc: Callable[[Tensor, Tensor], Tensor]) -> Any:
    def model(x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0 * index, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(x)):
            own = loc(pyro.param("loc", torch.zeros(60)), index)
            pyro.sample("z", dist.Normal(own, 0.7))

    return model, guide


@pytest.mark.parametrize("shuffle", [True, False])
def test_parameters_cut_to_the_batch_are_refused_other_rows(shuffle: bool) -> None:
    x, index = torch.randn(60), torch.arange(60)
    pair = cut_to(x, lambda loc, index: loc[: len(index)])
    fit(pair, (x, index), epochs=1, batch_size=None)
    with pytest.raises(PairError, match="parameters belong to places in the batch"):
        fit(pair, loader(x, index, batch_size=60 if shuffle else 20, shuffle=shuffle), epochs=1)


@pytest.mark.parametrize(
    "loc",
    [lambda loc, index: loc[index], lambda loc, index: loc[0] + 0.3 * torch.rand(len(index))],
    ids=["looked up", "noise beside the sites"],
)
def test_parameters_that_follow_the_rows_are_not(loc: Any) -> None:
    x, index = torch.randn(60), torch.arange(60)
    fit(cut_to(x, loc), loader(x, index, batch_size=20, shuffle=True), epochs=1)


def test_rows_that_a_loader_leaves_out_are_said() -> None:
    """A bound of the first 40 of 45 rows, as of these as an array."""
    pair, x = recipes.vae(4, 2, hidden=(8,)), torch.rand(45, 4).round()
    with pytest.warns(PvaeWarning, match="results are of 40 rows, without the last 5"):
        found = bounds.elbo(pair, loader(x, batch_size=20, drop_last=True))
    assert found.num_data == 40
    assert bounds.elbo(pair, loader(x, batch_size=20)).num_data == 45
