"""Rows along any axis of the data: whatever the layout, the numbers are those of data first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae import Pair, bounds, diagnostics, export, latent, testing
from pvae.data import as_source
from pvae.errors import DataError, PairError

pytestmark = pytest.mark.usefixtures("store")
T, N, D = 5, 40, 2


class Model(nn.Module):
    """Sequences of vectors, with a label each; time comes first or second in its argument."""

    def __init__(self, *, time_first: bool) -> None:
        super().__init__()
        self.decoder = nn.Linear(2, D)
        self.time_first = time_first
        with torch.no_grad():
            self.decoder.weight.copy_(torch.tensor([[1.0, 0.5], [0.0, -0.8]]))

    def forward(self, x: Tensor, y: Tensor) -> None:
        x = x.transpose(0, 1) if self.time_first else x
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y[:, None] * x.new_ones(2), 1.0).to_event(1))
            loc = self.decoder(z)[..., None, :].expand(*z.shape[:-1], *x.shape[1:])
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(2), obs=x)


class Guide(nn.Module):
    def __init__(self, *, time_first: bool) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, 4)
        self.time_first = time_first
        with torch.no_grad():
            self.encoder.weight.copy_(torch.arange(8.0).reshape(4, D) / 10)

    def forward(self, x: Tensor, y: Tensor) -> None:
        x = x.transpose(0, 1) if self.time_first else x
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x.mean(1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def data(num_rows: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, T, D, generator=generator)
    return x, torch.randint(2, (num_rows,), generator=generator)


def both(num_rows: int = N) -> list[tuple[Pair, tuple[Tensor, Tensor]]]:
    """The same pair and data, rows first and time first."""
    x, y = data(num_rows)
    made = []
    for time_first in (False, True):
        torch.manual_seed(0)
        pair = Pair(Model(time_first=time_first), Guide(time_first=time_first), plate="data")
        made.append((pair, (x.transpose(0, 1).contiguous() if time_first else x, y)))
    return made


def _fit(pair: Pair, batch: tuple[Tensor, ...]) -> object:
    run = pvae.fit(pair, batch, valid=batch, epochs=3, batch_size=16, progress=False)
    parameters = [p.detach().flatten() for p in run.structure.parameters.values()]
    rows = [[row[k] for k in ("loss", "elbo", "valid_elbo")] for row in run.history]
    return [torch.tensor(rows), *parameters]


def _sbc(pair: Pair, batch: tuple[Tensor, ...]) -> object:
    return diagnostics.sbc(
        pair, batch, num_simulations=60, num_particles=9, progress=False
    ).ranks.double()


def _screen(pair: Pair, batch: tuple[Tensor, ...]) -> object:
    found = pvae.diagnose(pair, batch, num_data=20, num_particles=30, progress=False)
    return [found.num_data, [f.value for f in found.findings()]]


def _export(pair: Pair, batch: tuple[Tensor, ...]) -> object:
    tree = export.to_arviz(pair, batch, num_particles=2, progress=False)
    return [
        torch.from_numpy(np.asarray(v)) for group in tree.children.values() for v in group.values()
    ]


TOOLS: dict[str, Callable[[Pair, tuple[Tensor, ...]], object]] = {
    "fit": _fit,
    "elbo": lambda p, x: bounds.elbo(p, x, 3).per_datum,
    "evidence": lambda p, x: bounds.evidence(p, x, 20, max_rows=200).per_datum,
    "codes": lambda p, x: latent.codes(p, x),
    "sample": lambda p, x: latent.sample(p, x, site="x"),
    "surgery": lambda p, x: diagnostics.surgery(p, x, num_particles=5, progress=False).rate.values,
    "sensitivity": lambda p, x: diagnostics.sensitivity(p, x),
    "pit": lambda p, x: diagnostics.pit(p, x, num_particles=9, progress=False).values,
    "sbc": _sbc,
    "diagnose": _screen,
    "export": _export,
    "gradients": lambda p, x: [
        side.mean
        for side in diagnostics.gradient_noise(p, x, num_repeats=3, progress=False).sides.values()
    ],
    "check_pair": lambda p, x: testing.check_pair(p, x),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_numbers_are_those_of_data_first(tool: str) -> None:
    first, second = (TOOLS[tool](*made) for made in both())
    torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("num_rows", [N, T, D])
def test_axes_of_one_length_are_told_apart(num_rows: int) -> None:
    """By a run on one row fewer along each."""
    for (pair, batch), axes in zip(both(num_rows), ((0, 0), (1, 0)), strict=True):
        structure = pair.inspect(batch)
        assert structure.axes == axes
        assert structure.num_rows_of(batch) == num_rows
        assert structure.tied_to is None
        assert len(bounds.elbo(pair, batch).per_datum) == num_rows


def sequences(x: Tensor, times: Tensor) -> None:
    """Each time has a site of its own; times are shared by all data."""
    with pyro.plate("data", x.shape[1]):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for t in range(len(x)):
            pyro.sample(f"x{t}", dist.Normal(times[t] * z, 1.0), obs=x[t])


def of_sequences(x: Tensor, times: Tensor) -> None:
    variance = 1 / (1 + times.square().sum())
    with pyro.plate("data", x.shape[1]):
        gain = pyro.param("gain", torch.tensor(1.0))
        pyro.sample("z", dist.Normal(gain * variance * (times @ x), variance**0.5))


@pytest.mark.parametrize("num_rows", [7, 3, T])
def test_the_evidence_of_sequences(num_rows: int) -> None:
    """The guide is the posterior; x is normal with covariance 1 + times times'."""
    x = torch.randn(T, num_rows, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(0.5, 1.5, T)
    pair = Pair(sequences, of_sequences, plate="data")
    covariance = torch.outer(times, times) + torch.eye(T)
    exact = dist.MultivariateNormal(torch.zeros(T), covariance).log_prob(x.T)
    for found in (bounds.elbo(pair, (x, times)), bounds.evidence(pair, (x, times), 5)):
        torch.testing.assert_close(found.per_datum, exact, rtol=1e-9, atol=1e-9)
    assert pair.inspect((x, times)).axes == (1, None)
    run = pvae.fit(pair, (x, times), epochs=1, lr=1e-9, batch_size=2, progress=False)
    assert run.history[0]["elbo"] == pytest.approx(float(exact.mean()), rel=1e-6)


def test_longer_times_than_rows_that_a_look_takes() -> None:
    """The first look takes 128 rows; only then is it known along which axis."""
    x = torch.randn(150, 6, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(0.5, 1.5, 150) / 10
    pair = Pair(sequences, of_sequences, plate="data")
    covariance = torch.outer(times, times) + torch.eye(150)
    exact = dist.MultivariateNormal(torch.zeros(150), covariance).log_prob(x.T)
    found = bounds.elbo(pair, (x, times))
    torch.testing.assert_close(found.per_datum, exact, rtol=1e-9, atol=1e-9)


def test_a_loader_of_time_first_batches() -> None:
    (_, rows), (pair, _) = both()

    def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([x for x, _ in items], 1), torch.stack([y for _, y in items])

    loader = DataLoader(TensorDataset(*rows), batch_size=16, collate_fn=collate)
    found = bounds.elbo(pair, loader)
    assert len(found.per_datum) == N
    assert latent.codes(pair, loader).shape == (N, 2)
    torch.testing.assert_close(latent.codes(pair, loader), latent.codes(*both()[0]))


def test_a_bad_row_is_named_along_its_axis() -> None:
    _, (pair, (x, y)) = both()
    x[3, 17, 1] = torch.nan
    for look in (bounds.elbo, pvae.fit):
        with pytest.raises(DataError, match=r"data\[0\], row 17: expected finite values"):
            look(pair, (x, y))
    later = torch.cat([torch.zeros(T, 128, D), x], 1), torch.cat([torch.zeros(128), y])
    with pytest.raises(DataError, match=r"data\[0\], row 145: expected finite values"):
        bounds.elbo(pair, later)


def test_a_subsample_that_the_pair_draws_itself() -> None:
    x = torch.randn(T, N, generator=torch.Generator().manual_seed(0))

    def program(x: Tensor, *, is_guide: bool) -> None:
        with pyro.plate("data", x.shape[1], subsample_size=8) as rows:
            mean = x[:, rows].sum(0) / (T + 1)
            q = dist.Normal(mean, (1 / (T + 1)) ** 0.5)
            z = pyro.sample("z", q if is_guide else dist.Normal(0.0, 1.0))
            for t in () if is_guide else range(T):
                pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[t, rows])

    pair = Pair(
        lambda x: program(x, is_guide=False), lambda x: program(x, is_guide=True), plate="data"
    )
    exact = dist.MultivariateNormal(torch.zeros(T), torch.ones(T, T) + torch.eye(T)).log_prob(x.T)
    torch.testing.assert_close(bounds.evidence(pair, x, 3).per_datum, exact, rtol=1e-9, atol=1e-9)


def test_parameters_of_rows_along_another_axis() -> None:
    """The pair runs on all rows alone: they are those of what its site observes."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("times", len(x), dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(T, N, generator=torch.Generator().manual_seed(0))
    pair = Pair(model, AutoNormal(model), plate="data")
    structure = pair.inspect((x,))
    assert (structure.axes, structure.tied_to) == ((1,), N)
    run = pvae.fit(pair, x, epochs=300, batch_size=None, lr=0.05, progress=False)
    exact = dist.MultivariateNormal(torch.zeros(T), torch.ones(T, T) + torch.eye(T)).log_prob(x.T)
    found = bounds.evidence(pair, x, 500)
    torch.testing.assert_close(found.per_datum, exact, rtol=0, atol=0.05)
    with pytest.raises(PairError, match="all 40 rows in one batch"):
        run = pvae.fit(pair, x, epochs=1, batch_size=8, progress=False)
    assert len(run.history) == 300


def test_what_cannot_be_told_is_refused_with_the_line_that_works() -> None:
    _, (pair, batch) = both()
    with pytest.raises(PairError, match="length 5") as caught:
        Pair(pair.model, pair.guide).inspect((batch[0], batch[0]))
    assert "plate='data'" in str(caught.value)

    def scaled(x: Tensor, scales: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scales.mean()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, scales: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("w", torch.tensor(0.5)) * x, 0.5**0.5))

    scales = torch.linspace(0.5, 1.5, 6)
    with pytest.raises(PairError, match="argument 1, or another length where all share it"):
        Pair(scaled, guide).inspect((torch.zeros(6), scales))
    found = bounds.evidence((scaled, guide), (torch.zeros(7), scales), 3)
    expected = dist.Normal(0.0, 2**0.5).log_prob(torch.zeros(7))
    torch.testing.assert_close(found.per_datum, expected)


def test_a_mask_along_both_axes() -> None:
    """Padded sequences, time first."""
    x = torch.randn(T, N, generator=torch.Generator().manual_seed(0))
    lengths = 1 + torch.arange(N) % T
    seen = torch.arange(T)[:, None] < lengths

    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", x.shape[1]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("times", len(x), dim=-2), poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, seen: Tensor) -> None:
        variance = 1 / (1 + seen.sum(0))
        with pyro.plate("data", x.shape[1]):
            pyro.sample("z", dist.Normal(variance * (x * seen).sum(0), variance**0.5))

    pair = Pair(model, guide, plate="data")
    expected = torch.stack(
        [
            dist.MultivariateNormal(torch.zeros(n), torch.ones(n, n) + torch.eye(n)).log_prob(
                x[:n, i]
            )
            for i, n in enumerate(lengths.tolist())
        ]
    )
    found = bounds.evidence(pair, (x, seen), 3)
    torch.testing.assert_close(found.per_datum, expected, rtol=1e-9, atol=1e-9)
    replicated = diagnostics.predictive(pair, (x, seen), site="x", progress=False)
    assert replicated.num_data == N


def test_sources_along_other_axes() -> None:
    x, y = np.arange(12.0).reshape(3, 4), np.arange(4)
    source = as_source((x, y), dtype=torch.float64, axes=(1, 0))
    assert source.num_rows == 4
    rows, labels = source.rows(torch.tensor([2, 0]))
    assert rows.tolist() == x[:, [2, 0]].tolist()
    assert labels.tolist() == [2, 0]
    with pytest.raises(DataError, match="3 rows, like data"):
        as_source((x, y), axes=(0, 0))
    with pytest.raises(DataError, match="rows along the first axis"):
        as_source(TensorDataset(torch.zeros(3, 4)), axes=(1,))


def test_memory_maps_along_other_axes(tmp_path: object) -> None:
    path = f"{tmp_path}/x.npy"
    np.save(path, np.arange(12.0, dtype=np.float32).reshape(3, 4))
    source = as_source(np.load(path, mmap_mode="r"), axes=(1,))
    assert source.num_rows == 4
    (rows,) = source.rows(torch.tensor([3]))
    assert rows.tolist() == [[3.0], [7.0], [11.0]]
