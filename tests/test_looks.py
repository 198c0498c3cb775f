"""A look at a pair leaves what its programs hold in Python as it was, also where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide, easy_guide
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from torch import Tensor, nn

import pvae
from pvae import bounds
from pvae.errors import PairError, PvaeError
from pvae.pair import Pair

pytestmark = pytest.mark.usefixtures("store")
N = 12
LOG_P = dist.Normal(0.0, 2**0.5)
STEPS = 0
KEPT: list[float] = []


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def two_latents(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        u = pyro.sample("u", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0 + u), obs=x)


def easy(x: Tensor) -> Any:
    """One parameter a row: it can't be run on one row fewer."""

    @easy_guide(model)
    def guide(self: EasyGuide, x: Tensor) -> None:
        with self.plate("data", len(x)):
            loc = pyro.param("loc", lambda: torch.zeros(N))
            pyro.sample("z", dist.Normal(loc, 1.0))

    return model, guide


def easy_group(x: Tensor) -> Any:
    @easy_guide(two_latents)
    def guide(self: EasyGuide, x: Tensor) -> None:
        group = self.group(match="z|u")
        loc = pyro.param("loc", lambda: torch.zeros(N, 2))
        with self.plate("data", len(x)):
            group.sample("both", dist.Normal(loc, 1.0).to_event(1))

    return two_latents, guide


def listed(x: Tensor) -> Any:
    guide = AutoGuideList(two_latents)
    guide.append(AutoNormal(pyro.poutine.block(two_latents, hide=["u"])))
    guide.append(AutoDelta(pyro.poutine.block(two_latents, hide=["z"])))
    return two_latents, guide


def subsampled(x: Tensor) -> Any:
    def create_plates(x: Tensor) -> Any:
        return pyro.plate("data", len(x))

    return model, AutoNormal(model, create_plates=create_plates)


GUIDES: dict[str, Callable[[Tensor], Any]] = {
    "EasyGuide": easy,
    "EasyGuide, a group": easy_group,
    "AutoGuideList": listed,
    "create_plates": subsampled,
    "AutoNormal": lambda x: (model, AutoNormal(model)),
    "AutoStructured": lambda x: (two_latents, AutoStructured(two_latents)),
    "AutoNormalMessenger": lambda x: (model, AutoNormalMessenger(model)),
    "AutoRegressiveMessenger": lambda x: (model, AutoRegressiveMessenger(model)),
}


@pytest.mark.parametrize("name", GUIDES)
def test_pyros_svi_goes_on_as_if_nobody_had_looked(name: str) -> None:
    x, found = torch.randn(N), []
    for looks in (False, True):
        pyro.clear_param_store()
        programs = GUIDES[name](x)
        svi = SVI(*programs, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        torch.manual_seed(0)
        losses = [svi.step(x)]
        if looks:
            Pair(*programs).inspect(x)
            with pytest.raises(PvaeError):
                Pair(*programs).inspect(torch.zeros(0))
        losses += [svi.step(x) for _ in range(3)]
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-12)


def test_a_guide_with_a_parameter_a_row_is_trained() -> None:
    x = torch.randn(N)
    pair = easy(x)
    pvae.fit(pair, x, batch_size=None, epochs=300, lr=0.05, progress=False)
    torch.testing.assert_close(pyro.param("loc"), x / 2, rtol=0, atol=0.3)
    evidence = bounds.evidence(pair, x, 2000)
    assert evidence.mean == pytest.approx(LOG_P.log_prob(x).mean().item(), abs=0.05)


class Stateful(nn.Module):
    """A guide with all kinds of state in Python."""

    calls_of_all = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.calls, self.rates, self.seen = 0, [0.5], {"rows": 0}
        self.cached: Tensor | None = None

    def forward(self, x: Tensor) -> None:
        global STEPS
        STEPS += 1
        Stateful.calls_of_all += 1
        self.calls += 1
        self.rates.append(0.5**self.calls)
        self.seen["rows"] += len(x)
        KEPT.append(float(len(x)))
        if len(x) == 0:
            raise RuntimeError("no rows")
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.weight * x, 0.7))


def state_of(guide: Stateful) -> list[object]:
    return [STEPS, Stateful.calls_of_all, guide.calls, [*guide.rates], dict(guide.seen), [*KEPT]]


@pytest.mark.parametrize("rows", [N, 0], ids=["a look", "a look that fails"])
def test_counters_and_lists_are_put_back(rows: int) -> None:
    guide, count = Stateful(), 0

    def counted(x: Tensor) -> None:
        nonlocal count
        count += 1
        model(x)

    before = state_of(guide)
    pair = Pair(counted, guide)
    if rows:
        pair.inspect(torch.randn(rows))
    else:
        with pytest.raises(PairError, match="no rows"):
            pair.inspect(torch.zeros(rows))
    assert state_of(guide) == before
    assert count == 0
    guide(torch.ones(2))
    assert state_of(guide) != before
