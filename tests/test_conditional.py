"""The coercions: what else is accepted where a Conditional is, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae.conditional import Conditional, as_conditional, split_parameters
from pvae.errors import ArgumentError, PairError


def test_an_instances_tensors_move_and_are_saved() -> None:
    fn = dist.Normal(torch.arange(3.0), torch.ones(3)).to_event(1)
    part = as_conditional(fn)
    assert sorted(k.split("_")[-1] for k in part.state_dict()) == ["loc", "scale"]
    single = part.float()()
    assert single.sample().dtype == torch.float32
    assert fn.base_dist.loc.dtype == torch.float64  # the user's own stays as it was
    if torch.cuda.is_available():
        assert part.cuda()().sample().is_cuda


def test_nested_instances_move() -> None:
    base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    transforms = [dist.transforms.AffineTransform(torch.ones(3), torch.full((3,), 2.0))]
    part = as_conditional(dist.TransformedDistribution(base, transforms))
    assert part.float()().log_prob(torch.zeros(3, dtype=torch.float32)).dtype == torch.float32
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(4)), dist.Normal(torch.randn(4, 2), 1.0).to_event(1)
    )
    part = as_conditional(mixture).float()
    assert part().log_prob(torch.zeros(2, dtype=torch.float32)).dtype == torch.float32


def test_a_module_is_registered_and_gets_as_much_context_as_it_takes() -> None:
    class Prior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self) -> Any:
            return dist.Normal(self.loc, 1.0).to_event(1)

    part = as_conditional(Prior())
    assert len(list(part.parameters())) == 1
    assert part(torch.zeros(5)).event_shape == (2,)
    seen = []

    def guide(x: Tensor, y: Tensor) -> Any:
        seen.append((x, y))
        return dist.Normal(x, 1.0).to_event(1)

    x, y = torch.zeros(5, 2), torch.ones(5)
    as_conditional(guide)(x, y)
    assert seen[0][1] is y


def test_a_conditional_is_taken_as_it_is() -> None:
    part = as_conditional(dist.Normal(torch.zeros(2), 1.0).to_event(1))
    assert as_conditional(part) is part


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (3, "a Conditional, a Pyro distribution"),
        (dist.Normal, "the class Normal"),
        (torch.distributions.Normal(0.0, 1.0), "pyro.distributions.Normal"),
        (dist.Normal(torch.zeros(3), 1.0), r".to_event\(1\)"),
        (
            dist.Normal(torch.zeros(3, requires_grad=True), 1.0).to_event(1),
            "without trainable tensors",
        ),
    ],
)
def test_what_is_refused(thing: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        as_conditional(thing)


def test_a_wrong_event_shape_names_the_fix() -> None:
    class Wrong(Conditional):
        def forward(self, *context: Tensor) -> Any:
            return dist.Normal(torch.zeros(3), 1.0)

    with pytest.raises(PairError, match=r"event_shape \(3,\).*\n.*to_event\(1\)"):
        Wrong(3)()

    class NotPyro(Conditional):
        def forward(self, *context: Tensor) -> Any:
            return torch.distributions.Normal(0.0, 1.0)

    with pytest.raises(PairError, match="Pyro distribution"):
        NotPyro()()


@pytest.mark.parametrize(
    ("output", "num_params", "event_shape"),
    [
        (torch.arange(24.0).reshape(2, 12), 2, (6,)),
        (torch.arange(24.0).reshape(2, 12), 2, (2, 3)),
        (torch.arange(24.0).reshape(2, 4, 3), 2, (2, 3)),
        (torch.arange(48.0).reshape(2, 2, 12), 1, (3, 2, 2)),
    ],
)
def test_split(output: Tensor, num_params: int, event_shape: tuple[int, ...]) -> None:
    parts = split_parameters(output, num_params, event_shape)
    assert len(parts) == num_params
    flat = output.reshape(*output.shape[: output.dim() - len(event_shape)], -1)
    if output.shape[-1] != num_params * torch.Size(event_shape).numel():
        flat = output.flatten(-len(event_shape))
    joined = torch.cat([p.flatten(-len(event_shape)) for p in parts], -1)
    assert all(p.shape[-len(event_shape) :] == event_shape for p in parts)
    torch.testing.assert_close(joined.reshape(-1), flat.reshape(-1))


def test_two_outputs_are_taken_as_they_are() -> None:
    a, b = torch.zeros(5, 3), torch.ones(5, 3)
    assert split_parameters((a, b), 2, (3,)) == (a, b)


def test_a_wrong_output_is_refused() -> None:
    with pytest.raises(PairError, match=r"encoder.network.*\(5, 7\)"):
        split_parameters(torch.zeros(5, 7), 2, (3,), "encoder")


def test_importing_zuko_is_undone() -> None:
    """zuko turns torch's argument validation off for the process; a flow turns it on again."""
    pytest.importorskip("zuko", reason="zuko is an extra")
    code = """
import pyro, torch, zuko
from pvae.conditional import as_conditional
assert pyro.settings.get("validate_distributions_torch") is False
as_conditional(zuko.flows.NICE(2))
assert pyro.settings.get("validate_distributions_torch") is True
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    assert pyro.settings.get("validate_distributions_pyro") is True


# Distribution instances


def test_an_instance_follows_what_is_loaded() -> None:
    """Nothing that the instance had computed outlives a new state, a copy or a move."""
    instances = {
        "logits": lambda v: dist.Categorical(logits=v),
        "probs": lambda v: dist.Bernoulli(probs=v.sigmoid()).to_event(1),
        "mixture": lambda v: dist.MixtureSameFamily(
            dist.Categorical(logits=v), dist.Normal(torch.arange(3.0), 1.0)
        ),
        "tril": lambda v: dist.MultivariateNormal(v, precision_matrix=torch.eye(3) * v.exp()),
        "transformed": lambda v: dist.TransformedDistribution(
            dist.Normal(v, 1.0).to_event(1), [dist.transforms.AffineTransform(v, 2.0)]
        ),
    }
    for name, make in instances.items():
        first, second = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2.0, -1.0, 0.5])
        instance = make(first)
        x = make(second).sample()
        instance.log_prob(x)  # fills what is computed when first asked for
        part, other = as_conditional(instance), as_conditional(make(second))
        part().log_prob(x)
        part.load_state_dict(other.state_dict())
        torch.testing.assert_close(part().log_prob(x), make(second).log_prob(x), msg=name)
        copied = copy.deepcopy(part)
        copied.load_state_dict(as_conditional(make(first)).state_dict())
        torch.testing.assert_close(copied().log_prob(x), make(first).log_prob(x), msg=name)
        torch.testing.assert_close(part().log_prob(x), make(second).log_prob(x), msg=name)
        single = part.float()().log_prob(x.float())
        torch.testing.assert_close(
            single.double(), make(second).log_prob(x), rtol=1e-4, atol=1e-4, msg=name
        )


def test_trainable_parts_of_an_instance_are_refused() -> None:
    flow = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.Planar(3)]
    )
    with pytest.raises(ArgumentError, match="a distribution without trainable tensors"):
        as_conditional(flow)


def test_a_network_is_no_distribution() -> None:
    part = as_conditional(nn.Linear(3, 4), "guide")
    with pytest.raises(ArgumentError, match=r"(?s)it is a network.*guides\.MeanField\(network"):
        part(torch.zeros(5, 3))
