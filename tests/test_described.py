"""What parts say of themselves: every argument that makes two parts different makes them differ."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae import corruptions, guides, likelihoods, networks, penalties, priors
from pvae.conditional import Conditional, Unconditional, as_conditional
from pvae.described import Described, description
from pvae.penalties import on_side
from pvae.types import Dist
from pvae.vae import Guide

MODULES = (priors, likelihoods, guides, corruptions, penalties, networks)


def linear(num_params: int) -> nn.Module:
    return nn.Linear(3, 4 * num_params)


def deep(num_params: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4 * num_params))


def half(raw: Tensor) -> Tensor:
    return (0.5 * raw).exp()


def draws(num: int) -> Tensor:
    return torch.zeros(num, 3)


def squares(x: Tensor, z: Tensor) -> Tensor:
    return z.square().sum(-1)


def absolute(x: Tensor, z: Tensor) -> Tensor:
    return z.abs().sum(-1)


# For each class, each argument of its constructor: a value, and another one.
Values = dict[str, tuple[object, object]]
NETWORK: Values = {"network": (linear, deep), "event_shape": (4, (2, 2))}
CONTEXT: Values = {
    "activation": (nn.ReLU, nn.ELU),
    "context_dim": (0, 2),
    "in_scale": (1.0, 1 / 255),
    "out_activation": (None, nn.Sigmoid),
}
TABLE: dict[type, Values] = {
    priors.StandardNormal: {"event_shape": (3, (3, 1))},
    priors.Normal: {"event_shape": (3, 4)},
    priors.Flat: {"event_shape": (3, 4)},
    priors.Laplace: {"event_shape": (3, 4), "rate": (1.0, 1.0000001)},
    priors.StudentT: {"event_shape": (3, 4), "df": (3.0, 3.5), "scale": (1.0, 2.0)},
    likelihoods.Bernoulli: {**NETWORK, "grey_values": (False, True)},
    likelihoods.Binomial: {**NETWORK, "total_count": (16, 255)},
    likelihoods.Categorical: {"network": (linear, deep), "event_shape": (4, (2, 2)),
                              "levels": (5, 6)},
    likelihoods.Gaussian: {**NETWORK, "sigma": (0.5, "optimal"), "min_sigma": (1e-3, 1e-4)},
    guides.MeanField: {**NETWORK, "to_scale": (torch.exp, half)},
    guides.Point: NETWORK,
    guides.NearestCode: {"network": (linear, deep), "event_shape": ((2, 2), (4, 1)),
                         "num_codes": (8, 9), "decay": (0.99, 0.9), "dead": (0.01, 0.02)},
    corruptions.Noise: {"sigma": (0.1, 0.2)},
    corruptions.Masking: {"rate": (0.1, 0.2)},
    corruptions.SaltAndPepper: {"rate": (0.1, 0.2), "low": (0.0, -1.0), "high": (1.0, 2.0)},
    corruptions.BlockMasking: {"size": (3, 4), "fill": (0.0, 0.5)},
    corruptions.Downsampling: {"factor": (2, 3)},
    penalties.Custom: {"function": (squares, absolute), "weight": (1.0, 1.0000001)},
    penalties.Activations: {"weight": (1.0, 2.0), "code": (True, False), "output": (False, True)},
    penalties.Contractive: {"weight": (1.0, 2.0), "squared": (False, True),
                            "num_probes": (None, 4), "max_entries": (2**24, 2**20)},
    penalties.Commitment: {"weight": (0.25, 0.5)},
    penalties.WeightDecay: {"weight": (1.0, 2.0), "sides": (("guide", "model"), ("model",))},
    penalties.MMD: {"weight": (1.0, 2.0), "target": (None, draws), "kernel": ("imq", "rbf")},
    networks.MLP: {"in_shape": (6, (2, 3)), "out_shape": (4, (2, 2)), "hidden": ((8,), (4, 8)),
                   **CONTEXT},
    networks.ConvEncoder: {"in_shape": ((1, 8, 8), (1, 7, 7)), "out_features": (4, 5),
                           "channels": ((2,), (2, 3)), "hidden": (8, 9),
                           "residual": (False, True), **CONTEXT},
    networks.ConvDecoder: {"in_features": (4, 5), "out_shape": ((1, 8, 8), (1, 7, 7)),
                           "channels": ((2,), (3, 2)), "hidden": (8, 9),
                           "activation": (nn.ReLU, nn.ELU), "residual": (False, True),
                           "context_dim": (0, 2)},
}  # fmt: skip


def public_parts(module: ModuleType) -> list[type]:
    named = [getattr(module, name) for name in module.__all__]
    modules = [c for c in named if inspect.isclass(c) and issubclass(c, nn.Module)]
    return [c for c in modules if not inspect.isabstract(c)]


def test_the_table_has_every_argument_of_every_public_part() -> None:
    parts = [kind for module in MODULES for kind in public_parts(module)]
    assert set(parts) == set(TABLE)
    for kind, values in TABLE.items():
        assert set(values) == set(inspect.signature(kind).parameters), kind


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_every_argument_is_in_the_repr(kind: type) -> None:
    first = {name: one for name, (one, _) in TABLE[kind].items()}
    shown = [repr(kind(**first)), repr(kind(**first))]
    assert shown[0] == shown[1]
    others = [repr(kind(**{**first, name: other})) for name, (_, other) in TABLE[kind].items()]
    assert len({shown[0], *others}) == 1 + len(others)
    assert not re.search("0x[0-9a-f]", "".join([*shown, *others]))
    for again in (copy.deepcopy(kind(**first)), pickle.loads(pickle.dumps(kind(**first)))):  # noqa: S301
        assert repr(again) == shown[0]


class Heavy(Conditional):
    """A user's own part: numbers as argument, attribute, and constant."""

    def __init__(self, df: float, *shape: int, floor: float = 0.0, **options: float) -> None:
        super().__init__(shape)
        self.temperature = 2.0
        self.loc = nn.Parameter(torch.zeros(shape))
        self.cells = torch.full(shape, floor)

    def forward(self, *context: Tensor) -> Dist:
        return dist.Normal(self.loc, self.temperature).to_event(1)


def test_parts_that_users_write() -> None:
    shown = {repr(Heavy(3.0, 2)), repr(Heavy(3.0, 3)), repr(Heavy(4.0, 2)),
             repr(Heavy(3.0, 2, floor=1.0)), repr(Heavy(3.0, 2, tail=1.0))}  # fmt: skip
    assert len(shown) == 5
    changed = Heavy(3.0, 2)
    changed.temperature = 3.0
    assert repr(changed) not in shown
    trained = Heavy(3.0, 2)
    trained.loc.data += 1  # what training changes isn't said
    assert repr(trained) in shown

    class Mine(priors.Laplace):
        def __init__(self) -> None:
            super().__init__(2, rate=7.0)

    assert "rate=7.0" in repr(Mine())


def test_a_pair_says_what_it_has_of_functions() -> None:
    part = guides.Point(linear, 4)
    shown = {repr(Guide(part, corruption=each)) for each in (None, half, torch.exp)}
    assert len(shown) == 3
    heavy, light = (on_side("guide", penalties.Contractive(w)) for w in (2.0, 1.0))
    assert repr(Guide(part, penalties=list(heavy))) != repr(Guide(part, penalties=list(light)))


def test_what_is_shown_is_what_a_part_has_now() -> None:
    prior, other = priors.StudentT(2, df=3.0), priors.StudentT(2, df=5.0)
    prior.load_state_dict(other.state_dict())
    assert repr(prior) == repr(other)
    assert repr(prior.float()) == repr(other.float())
    likelihood = likelihoods.Gaussian(linear, 4, sigma=0.5)
    likelihood.min_sigma = 0.25
    assert "min_sigma=0.25" in repr(likelihood)
    before = repr(likelihoods.Gaussian(linear, 4))
    trained = likelihoods.Gaussian(linear, 4)
    trained(torch.zeros(2, 3)).log_prob(torch.ones(2, 4))
    assert float(trained.batches_seen) == 1
    assert repr(trained) == before  # a running mean is a state


def instances() -> dict[str, Callable[[float], Dist]]:
    transforms = dist.transforms
    return {
        "scale": lambda v: dist.Normal(torch.zeros(2), v).to_event(1),
        "many": lambda v: dist.Normal(torch.arange(50.0) * v, 1.0).to_event(1),
        "probs": lambda v: dist.Bernoulli(probs=torch.full((2,), v)).to_event(1),
        "mixture": lambda v: dist.MixtureSameFamily(
            dist.Categorical(logits=torch.tensor([0.0, v])), dist.Normal(torch.arange(2.0), 1.0)
        ),
        "transform": lambda v: dist.TransformedDistribution(
            dist.Normal(0.0, 1.0),
            [transforms.ExpTransform(), transforms.AffineTransform(0.0, torch.tensor(v))],
        ),
        "support": lambda v: dist.Uniform(0.0, v),
        "mask": lambda v: dist.Normal(torch.zeros(2), 1.0).mask(v > 0.3).to_event(1),
    }


@pytest.mark.parametrize("name", instances())
def test_instances_show_the_values_of_their_parameters(name: str) -> None:
    make = instances()[name]
    one, other = as_conditional(make(0.25)), as_conditional(make(0.75))
    assert repr(one) == repr(as_conditional(make(0.25)))
    assert repr(one) != repr(other)
    if name != "mask":
        one.load_state_dict(other.state_dict())
    elif name == "mask":
        one = other
    assert repr(one) == repr(other)


def test_values_in_words() -> None:
    """Equal values read alike in any type and process; others differ; nothing is long."""
    assert description(torch.tensor(0.1)) == description(torch.tensor(0.1, dtype=torch.float32))
    assert description(np.float64(0.1)) == description(0.1) == "0.1"
    assert description([1, 2]) == description((1, 2)) == "(1, 2)"
    assert description(torch.relu) != description(torch.exp)
    assert description(torch.ones(3)) != description(torch.ones(4))
    single, double = torch.arange(99, dtype=torch.float32), torch.arange(99, dtype=torch.float64)
    assert description(single) == description(double) != description(double + 1e-9)
    assert len(description(list(range(1000)))) < 60
    assert description(list(range(1000))) != description(list(range(1001)))
    assert description(torch.tensor([torch.nan, 1.0])) == "[nan, 1.0]"

    class Plain:
        def __init__(self, level: float) -> None:
            self.level = level

    assert description(Plain(1.0)).endswith("Plain(level=1.0)")


def test_the_text_is_the_same_in_another_process() -> None:
    code = """
import torch, pyro.distributions as dist
from pvae import guides, networks, priors
from pvae.conditional import as_conditional
print(guides.MeanField(networks.MLP(3, 4), 2), priors.Laplace(2, rate=0.1))
print(as_conditional(dist.Normal(torch.arange(50.0), 1.0).to_event(1)))
"""
    outputs = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1


def test_wrong_arguments_are_python_s_own_error() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'sigma'"):
        corruptions.Noise()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="abstract"):
        Unconditional(3)  # type: ignore[abstract]
    assert repr(Described()) == "Described()"
