"""A pair is where its tensors are, and what is passed to it goes there."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae import bounds, data, diagnostics, export, latent, objectives, recipes, testing
from pvae.errors import ArgumentError, PairError, PvaeWarning
from pvae.types import Program

pytestmark = [pytest.mark.device, pytest.mark.float32, pytest.mark.usefixtures("store")]

X = torch.tensor([-1.0, 0.5, 2.0, 0.0, -0.3])


def model_with(w: Tensor, x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(w[0] * z, w[1]), obs=x)


def guide_with(w: Tensor, x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        variance = 1 / (1 + (w[0] / w[1]) ** 2)
        pyro.sample("z", dist.Normal(x * w[0] / w[1] ** 2 * variance, variance.sqrt()))


def log_evidence(w: Tensor) -> Tensor:
    """log p(x) of each datum, which the ELBO of the exact posterior is, too."""
    return dist.Normal(0.0, (w[0] ** 2 + w[1] ** 2).sqrt()).log_prob(X)


def check_elbo(estimate: pvae.estimate.Estimate, w: Tensor) -> None:
    each = estimate.per_datum.cpu().float()
    torch.testing.assert_close(each, log_evidence(w.cpu()), atol=1e-5, rtol=1e-5)


class Held(nn.Module):
    """A program that holds w: as a parameter, a buffer, or what is neither."""

    def __init__(self, program: Callable[[Tensor, Tensor], None], w: Tensor, how: str) -> None:
        super().__init__()
        self.program, self.how = program, how
        if how == "frozen":
            self.w = nn.Parameter(w, requires_grad=False)
        elif how == "buffer":
            self.register_buffer("w", w)
        else:
            self.held = {"w": (w,)}

    def forward(self, x: Tensor) -> None:
        self.program(self.held["w"][0] if self.how == "attribute" else self.w, x)


class Owner:
    """An object whose methods are the programs."""

    def __init__(self, w: Tensor) -> None:
        self.w = w

    def model(self, x: Tensor) -> None:
        model_with(self.w, x)

    def guide(self, x: Tensor) -> None:
        guide_with(self.w, x)


def stored(program: Callable[[Tensor, Tensor], None], w: Tensor) -> Program:
    return lambda x: program(pyro.param("w", w.clone()).detach(), x)


def made(program: Callable[[Tensor, Tensor], None], w: Tensor) -> Program:
    numbers, where = w.tolist(), str(w.device)
    return lambda x: program(torch.tensor(numbers, device=where), x)


def held(program: Callable[[Tensor, Tensor], None], w: Tensor, how: str) -> Program:
    return Held(program, w, how)


KINDS: dict[str, Callable[[Callable[[Tensor, Tensor], None], Tensor], Program]] = {
    "closure": lambda program, w: lambda x: program(w, x),
    "argument": lambda program, w: partial(program, w),
    "frozen": partial(held, how="frozen"),
    "buffer": partial(held, how="buffer"),
    "attribute": partial(held, how="attribute"),
    "store": stored,
    "made": made,
}


@pytest.fixture
def w(device: torch.device) -> Tensor:
    return torch.tensor([1.5, 0.7], device=device)


def pair_of(kind: str, w: Tensor) -> pvae.Pair:
    if kind == "methods":
        owner = Owner(w)
        return pvae.Pair(owner.model, owner.guide)
    return pvae.Pair(KINDS[kind](model_with, w), KINDS[kind](guide_with, w))


@pytest.mark.parametrize("kind", [*KINDS, "methods"])
def test_a_pair_without_trainable_parameters_is_where_its_tensors_are(kind: str, w: Tensor) -> None:
    for x in (X, X.to(w.device)):
        pair = pair_of(kind, w)
        assert pair.inspect(x).device == w.device
        check_elbo(bounds.elbo(pair, x), w)
        assert latent.codes(pair, x).device == w.device


def test_constants_that_follow_the_data_leave_a_pair_where_these_are(w: Tensor) -> None:
    host = w.cpu()
    pair = pvae.Pair(lambda x: model_with(host.to(x), x), lambda x: guide_with(host.to(x), x))
    assert pair.inspect(X.to(w.device)).device == w.device
    assert pair.inspect(X).device == X.device
    check_elbo(bounds.elbo(pair, X, device=w.device), w)


def test_constants_of_the_host_take_the_data_there(w: Tensor) -> None:
    """It is said, and refused where another device is asked for."""
    pair = pair_of("closure", w.cpu())
    if w.device == X.device:
        check_elbo(bounds.elbo(pair, X), w)
        return
    with pytest.warns(PvaeWarning, match=r"Data go to the CPU(.|\n)*new_zeros"):
        check_elbo(bounds.elbo(pair, X.to(w.device)), w)
    with (
        pytest.raises(ArgumentError, match="whose tensors can be on"),
        pytest.warns(PvaeWarning, match="Data go to the CPU"),
    ):
        bounds.elbo(pvae.Pair(pair.model, pair.guide), X, device=w.device)


def test_tools_run_on_a_pair_without_trainable_parameters(w: Tensor) -> None:
    pair, quiet = pair_of("closure", w), {"progress": False}
    testing.check_pair(pair, X)
    exact = float(log_evidence(w.cpu()).mean())
    assert math.isclose(bounds.evidence(pair, X, 20).mean, exact, abs_tol=1e-4)
    assert export.to_arviz(pair, X, num_particles=3)["posterior"].sizes["draw"] == 3
    x = X.repeat(10)
    ranks = diagnostics.sbc(pair, x, num_simulations=20, num_particles=9, **quiet)  # type: ignore[arg-type]
    assert ranks.ranks.shape == (20, 1)
    assert diagnostics.importance(pair, X, num_particles=25).khat.shape == (5,)
    parts = diagnostics.surgery(pair, x)
    assert math.isclose(-parts.rate.mean - parts.distortion.mean, exact, abs_tol=1e-4)


def test_a_pair_that_moves_takes_batches_along(device: torch.device) -> None:
    vae, x = recipes.vae(6, 2, hidden=(4,)), torch.rand(8, 6).round()
    before = vae.inspect(x)
    vae.to(device)
    assert vae.home().device == vae.inspect(x).device == vae.inspect(x.to(device)).device
    assert vae.encode(x).device == vae.decode(torch.zeros(1, 2)).device == vae.home().device
    vae.cpu()
    assert vae.inspect(x).device == before.device


def test_steps_take_batches_of_the_host(device: torch.device) -> None:
    """A step on them is the step on the same batch on the device."""
    x = torch.rand(8, 6).round()
    losses = []
    for batch in (x, x.to(device)):
        torch.manual_seed(0)
        vae = recipes.vae(6, 2, hidden=(4,)).to(device)
        for loss in (Trace_ELBO(), TraceMeanField_ELBO(), objectives.IWAE(3)):
            svi = pvae.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss)
            losses += [float(svi.step(batch)), float(svi.evaluate_loss(batch))]
        losses.append(objectives.ELBO().loss(vae.model, vae.guide, batch))
    assert losses[:7] == losses[7:]


def test_what_has_to_be_on_the_host_stays_there(device: torch.device) -> None:
    """The lengths of ``pack_padded_sequence``, where what is beside them isn't on the host."""
    net = nn.Linear(2, 3).to(device)

    def model(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.sum((1, 2)))

    def guide(x: Tensor, lengths: Tensor) -> None:
        pyro.module("net", net)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        sums = pad_packed_sequence(packed, batch_first=True)[0].sum(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(sums), 1.0).to_event(1))

    x, lengths = torch.ones(4, 5, 2, device=device), torch.tensor([5, 3, 2, 1])
    svi = pvae.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert math.isfinite(svi.step(x, lengths))


class OnHost(nn.Module):
    """A model that makes tensors on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(z + torch.zeros(2), self.scale.exp()).to_event(1), obs=x)


class Amortised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))


def test_modules_that_make_tensors_on_the_host_are_trained_there(device: torch.device) -> None:
    pair, x = pvae.Pair(OnHost(), Amortised()), torch.randn(8, 2)
    if device.type == "cpu":
        assert math.isfinite(pvae.fit(pair, x, epochs=1, progress=False).history[-1]["elbo"])
        return
    with pytest.warns(PvaeWarning, match=r"trained on 'cpu'(.|\n)*new_zeros"):
        run = pvae.fit(pair, x, epochs=1, progress=False)
    assert math.isfinite(run.history[-1]["elbo"])
    assert pair.home().device.type == "cpu"
    with pytest.raises(PairError, match="new_zeros"):
        pvae.fit(pair, x, epochs=1, device=device, progress=False)


def test_networks_of_functions_move_where_that_is_asked_for(device: torch.device) -> None:
    net, x = nn.Linear(2, 2), torch.randn(8, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    pvae.fit((model, guide), x, epochs=1, progress=False)
    assert net.weight.device.type == "cpu"
    pvae.fit((model, guide), x, epochs=1, device=device, progress=False)
    assert net.weight.device.type == device.type


def test_a_look_on_another_device_leaves_no_parameters_there(device: torch.device) -> None:
    """A network on the host is within reach, and the one on the device is used."""
    idle, net = nn.Linear(2, 3), nn.Linear(2, 3).to(device).requires_grad_(requires_grad=False)

    def model(x: Tensor) -> None:
        assert idle is not None
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z.to(device)), 1.0).to_event(1), obs=x)

    guide = AutoNormal(model)
    pvae.fit((model, guide), torch.ones(4, 3), batch_size=None, epochs=1, progress=False)
    assert {p.device.type for p in guide.parameters()} == {device.type}


def test_a_guide_of_more_rows_than_a_look_has(w: Tensor) -> None:
    """One parameter a row: its pair runs on all 200 rows alone."""
    x = torch.randn(200, device=w.device)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pair = pvae.Pair(model, AutoNormal(model))
    pvae.fit(pair, x, batch_size=None, epochs=2, lr=0.05, device=w.device, progress=False)
    estimate = bounds.elbo(pair, x, 500)
    loc, scale = pair.guide.locs.z.detach(), pair.guide.scales.z.detach()
    log_p = dist.Normal(0.0, 1.0).log_prob(loc) + dist.Normal(0.0, 1.0).log_prob(x - loc)
    exact = log_p - scale**2 + scale.log() + 0.5 * math.log(2 * math.pi * math.e)
    assert abs(estimate.mean - float(exact.mean())) < 5 * 3 / (200 * 500) ** 0.5


@pytest.mark.parametrize("name", ["improper", "half"])
def test_scores_made_on_the_host_count(name: str, w: Tensor) -> None:
    """Those of densities that make tensors of their own, or bring values to their parameters."""
    improper = name == "improper"
    own = dist.Normal if improper else dist.LogNormal

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            flat = dist.ImproperUniform(constraints.real, (), ())
            z = pyro.sample("z", flat if improper else dist.HalfCauchy(1.0))
            pyro.sample("x", dist.Normal(w[0] * z, w[1]), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", own(x / 10, w[1]))

    pair, x = pvae.Pair(model, guide), X.to(w.device)
    terms = pvae.terms.compute(pair.inspect(x), (x,), num_particles=4)
    site = terms.sites["z"]
    assert site.log_p is not None
    assert site.log_p.device == w.device
    z = site.value
    assert z is not None
    expected = 0 * z if improper else math.log(2 / math.pi) - (1 + z**2).log()
    torch.testing.assert_close(site.log_p, expected, atol=1e-5, rtol=1e-5)


def test_factors_and_masks_made_on_the_host_count(w: Tensor) -> None:
    seen = torch.tensor([True, False, True, True, False])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            flat = dist.ImproperUniform(constraints.real, (), ())
            z = pyro.sample("z", flat.mask(seen.to(w.device)))
            pyro.factor("f", torch.full((5,), 2.0))
            pyro.sample("x", dist.Normal(w[0] * z, w[1]), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, w[1]).mask(seen.to(w.device)))

    pair, x = pvae.Pair(model, guide), X.to(w.device)
    terms = pvae.terms.compute(pair.inspect(x), (x,))
    assert terms.sites["f"].log_p is not None
    assert terms.sites["f"].log_p.tolist() == [[2.0] * 5]
    assert terms.log_prior.device == w.device


@pytest.mark.parametrize("kind", ["none", "threshold", "static", "dynamic"])
def test_data_that_are_on_the_device(kind: data.arrays.Binarize, device: torch.device) -> None:
    """The same rows as of the same data on the host."""
    grey = torch.rand(10, 3)
    found = []
    for x in (grey, grey.to(device), grey.double().numpy()):
        source = data.as_source(data.Data((x, torch.arange(10).to(device)), binarize=kind), device)
        found.append([part.cpu() for part in source.rows(torch.arange(10, device=device))])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("binarize", ["none", "static", "dynamic"])
def test_data_larger_than_the_memory_that_is_free(
    binarize: data.arrays.Binarize,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches are those of data that fit, wherever the data are."""
    grey, order = torch.rand(12, 3), torch.tensor([3, 0, 11], device=device)
    np.save(tmp_path / "x.npy", grey.numpy())
    arrays = [grey, grey.to(device), grey.to(device, torch.float16).float(), grey.numpy()]
    arrays.append(np.load(tmp_path / "x.npy", mmap_mode="r"))
    expected = [
        data.as_source(data.Data(x, binarize=binarize), device).rows(order)[0] for x in arrays
    ]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10, 10))
    for x, rows in zip(arrays, expected, strict=True):
        source = data.as_source(data.Data(x, binarize=binarize), device)
        assert torch.equal(source.rows(order)[0], rows)
        batches = data.Batches(source, batch_size=5)
        assert [len(batch[0]) for batch in batches.epoch(0)] == [5, 5, 2]


def test_loaders_and_data_sets_of_device_tensors(device: torch.device) -> None:
    x = torch.rand(10, 6).round()
    there = TensorDataset(x.to(device))
    vae = recipes.vae(6, 2, hidden=(4,)).to(device)
    values = [bounds.elbo(vae, rows).mean for rows in (x, x.to(device), there)]
    assert max(values) - min(values) < 1e-5
    loaders = DataLoader(there, 5), DataLoader(TensorDataset(x), 5)
    first, second = (bounds.elbo(vae, loader).mean for loader in loaders)
    assert abs(first - second) < 1e-5
    run = pvae.fit(vae, there, epochs=1, valid=x, device=device, progress=False)
    assert math.isfinite(run.history[-1]["valid_elbo"])
    vae.cpu()
    assert run.to_arviz(num_particles=2)["posterior"].sizes["draw"] == 2


def test_toys_are_where_their_weights_are(device: torch.device) -> None:
    toy = data.LinearGaussian.random(num_features=5, latent_dim=2)
    moved = data.LinearGaussian(toy.weight.to(device), toy.bias.to(device), toy.sigma)
    x = toy.sample(6)
    assert moved.sample(6).device == moved.weight.device
    torch.testing.assert_close(moved.sample(6).cpu(), x)
    for rows in (x, x.to(device)):
        torch.testing.assert_close(moved.log_evidence(rows).cpu(), toy.log_evidence(x))
        mean, covariance = moved.posterior(rows)
        torch.testing.assert_close(mean.cpu(), toy.posterior(x)[0])
        torch.testing.assert_close(covariance.cpu(), toy.posterior(x)[1])
