"""SBC with refits: ranks of what all data share, among draws of guides fitted to simulated data."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pvae import Pair, diagnostics
from pvae.errors import ArgumentError, UndefinedError
from pvae.pair.running import Batch

pytestmark = [pytest.mark.usefixtures("store")]
N, WIDE = 5, 2.0
X = torch.tensor([0.3, -1.2, 2.0, 0.4, 1.1])


def model(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(torch.tensor(0.0), WIDE))
    with pyro.plate("data", N):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


class Guide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroParam(torch.tensor(7.0))
        self.scale = PyroParam(torch.tensor(0.1), dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(self.loc, self.scale))


class Exactly:
    """A refit that sets the posterior, but for its width; stops at a number of data sets."""

    def __init__(self, width: float = 1.0, stop: int | None = None) -> None:
        self.width, self.stop, self.seen = width, stop, list[Tensor]()

    def __call__(self, pair: Pair, x: Batch) -> None:
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        assert isinstance(x, Tensor)
        self.seen.append(x)
        precision = N + WIDE**-2
        pair.guide.loc = x.sum() / precision
        pair.guide.scale = torch.tensor(self.width * precision**-0.5)


def test_exact_refits_are_uniform_and_narrow_ones_are_found() -> None:
    """Data sets are the model's; the pair's own guide is left as it is."""
    guide, exact = Guide(), Exactly()
    found = diagnostics.sbc((model, guide), X, refits=60, refit=exact, progress=False)
    assert found.ranks.shape == (60, 1)
    assert found.names == ("mean",)
    assert found.p_value > 1e-5
    assert "a fresh guide was fitted to each simulated data set" in str(found)
    means = torch.stack(exact.seen).mean(1)
    spread = (WIDE**2 + 1 / N) ** 0.5
    assert abs(float(means.mean())) < 6 * spread / 60**0.5
    assert abs(float(means.std()) / spread - 1) < 6 / 120**0.5
    assert (guide.loc.item(), guide.scale.item()) == (7.0, pytest.approx(0.1))
    narrow = diagnostics.sbc((model, guide), X, refits=60, refit=Exactly(0.25), progress=False)
    assert narrow.findings()[0].verdict == "bad"
    assert "q is too narrow" in str(narrow)


def test_an_interruption_gives_what_is_there() -> None:
    refit = Exactly(stop=12)
    found = diagnostics.sbc((model, Guide()), X, refits=50, refit=refit, progress=False)
    assert len(found.ranks) == 12
    assert "interrupted before all 50" in str(found)
    pyro.clear_param_store()
    with pytest.raises(KeyboardInterrupt):
        diagnostics.sbc((model, Guide()), X, refits=50, refit=Exactly(stop=9), progress=False)


@pytest.mark.slow
def test_autoguides_start_anew_and_are_fitted_by_themselves() -> None:
    """The posterior is among them; the guide that there was keeps its model and its fit."""
    guide = AutoNormal(model)
    guide(X)
    own = guide.model
    guide.locs.mean.data.fill_(50.0)
    found = diagnostics.sbc((model, guide), X, refits=10, num_particles=19, progress=False)
    assert float(found.tests.p_values.min()) > 1e-4
    ranks = found.ranks.double()
    assert 2 < float(ranks.mean()) < 17  # from 50 on all would be at an end
    assert guide.locs.mean.item() == 50.0
    assert guide.model is own


def test_parameters_of_the_store_are_copied() -> None:
    def functional(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("mean", dist.Normal(loc, 0.4))

    pyro.param("loc", torch.tensor(3.0))

    def refit(pair: Pair, x: Batch) -> None:
        pyro.get_param_store()["loc"] = torch.tensor(-1.0)

    diagnostics.sbc((model, functional), X, refits=10, refit=refit, progress=False)
    assert pyro.param("loc").item() == 3.0


def test_what_has_no_refits() -> None:
    with pytest.raises(ArgumentError, match="refits: expected an integer of at least 10"):
        diagnostics.sbc((model, Guide()), X, refits=5)
    pyro.clear_param_store()
    with pytest.raises(UndefinedError, match=r"point mass \(Delta\) at site 'mean'"):
        diagnostics.sbc((model, AutoDelta(model)), X, refits=10)
    pyro.clear_param_store()
    with pytest.raises(UndefinedError, match=r"diagnostics\.sbc\(pair, x, refits=20\)"):
        diagnostics.sbc((model, Guide()), X)

    def local(x: Tensor) -> None:
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def of_data(x: Tensor) -> None:
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    with pytest.raises(UndefinedError, match="latents of single data, 'z'"):
        diagnostics.sbc((local, of_data), X, refits=10)
    with pytest.raises(UndefinedError, match="a guide with parameters"):
        diagnostics.sbc(
            (model, lambda x: pyro.sample("mean", dist.Normal(torch.tensor(0.0), 1.0))),
            X,
            refits=10,
            progress=False,
        )
