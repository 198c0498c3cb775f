"""The conformance suite catches what it is made for: broken parts and pairs, one a rule."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae import VAE, guides, likelihoods, priors, recipes
from pvae.conditional import Conditional
from pvae.errors import ContractError, PairError, PvaeWarning
from pvae.networks import MLP
from pvae.testing import check_conditional, check_pair
from tests import pairs

D, Q, N = 6, 2, 8


class Base(Conditional):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(Q))


class NoEvent(Base):
    def forward(self, *context: Tensor) -> Any:
        return dist.Normal(self.loc, 1.0)


class Idle(Base):
    """Has a parameter that nothing depends on."""

    def forward(self, *context: Tensor) -> Any:
        return dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)


class InStore(Base):
    def forward(self, *context: Tensor) -> Any:
        return dist.Normal(pyro.param("loc", self.loc), 1.0).to_event(1)


class TwoBatch(Conditional):
    """Mixes up the leading dimensions: softmax over data once there are particles."""

    def __init__(self) -> None:
        super().__init__(D)
        self.layer = nn.Linear(Q, D)

    def forward(self, *context: Tensor) -> Any:
        return dist.Normal(self.layer(context[0]).softmax(dim=1), 1.0).to_event(1)


class NeverThere(dist.Normal):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) * float("inf")


class Infinite(Base):
    def forward(self, *context: Tensor) -> Any:
        return NeverThere(self.loc, 1.0).to_event(1)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("part", "context", "rule"),
    [
        (NoEvent, 0, "batch_shape"),
        (Idle, 0, r"parameters: expected a gradient for each; got none for loc"),
        (InStore, 0, "Pyro's global store"),
        (TwoBatch, 1, "leading dimensions"),
        (Infinite, 0, "log_prob: expected finite"),
    ],
)
def test_broken_parts(part: type[Conditional], context: int, rule: str) -> None:
    torch.set_default_dtype(torch.float32)
    with pytest.raises(ContractError, match=rule):
        check_conditional(part(), *(torch.randn(N, Q) for _ in range(context)))
    torch.set_default_dtype(torch.float64)


def test_constants_that_dont_move_are_caught() -> None:
    torch.set_default_dtype(torch.float32)

    class Constant(Base):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.full((Q,), 0.5)

        def forward(self, *context: Tensor) -> Any:
            loc = (self.loc + self.shift).to(self.shift.dtype)
            return dist.Normal(loc, self.shift).to_event(1)

    with pytest.raises(ContractError, match=r"everything follows \.double"):
        check_conditional(Constant())
    torch.set_default_dtype(torch.float64)


class BatchCoupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = MLP(Q, D, (8,))

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z - z.mean(-2, keepdim=True))


def test_a_pair_whose_data_depend_on_each_other() -> None:
    pair = VAE(
        priors.StandardNormal(Q),
        likelihoods.Bernoulli(BatchCoupled(), D),
        guides.MeanField(MLP(D, 2 * Q), Q),
    )
    with pytest.raises(ContractError, match="don't depend on the rest of the batch"):
        check_pair(pair, torch.rand(N, D).round())


def test_a_pair_with_an_idle_parameter() -> None:
    pair = recipes.vae(D, Q, hidden=(8,))
    pair.guide.spare = nn.Parameter(torch.zeros(3))
    with pytest.raises(ContractError, match=r"none for guide\.spare"):
        check_pair(pair, torch.rand(N, D).round())


def test_a_pair_that_doesnt_match() -> None:
    model, _, batch = pairs.two_sites(torch.device("cpu"))
    _, guide, _ = pairs.subsample_given(torch.device("cpu"))
    with pytest.raises(PairError, match="one full size in model and guide"):
        check_pair((model, guide), batch)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("name", sorted(set(pairs.PAIRS) - {"pyro_modules"}))
def test_good_pairs_pass(name: str, device: torch.device) -> None:
    model, guide, batch = pairs.PAIRS[name](device)
    check_pair((model, guide), batch)


@pytest.mark.usefixtures("store")
def test_a_pyro_module_is_found_in_the_store() -> None:
    model, guide, batch = pairs.pyro_modules(torch.device("cpu"))
    with pytest.warns(PvaeWarning, match="Pyro's global store"):
        check_pair((model, guide), batch)


def test_looping_is_a_warning_and_no_failure() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(Q, D)

        def forward(self, z: Tensor) -> Tensor:
            return torch.addmm(self.layer.bias, z, self.layer.weight.T)

    pair = VAE(
        priors.StandardNormal(Q),
        likelihoods.Bernoulli(Strict(), D),
        guides.MeanField(MLP(D, 2 * Q), Q),
    )
    with pytest.warns(PvaeWarning, match="looped"):
        check_pair(pair, torch.rand(N, D).round())
