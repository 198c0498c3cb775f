"""Pyro's parameter store: what pairs share by a name is said, and what is frozen stays so.

The store has one tensor for a name. Autoguides, and modules of Pyro's, take what is there.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pvae
from pvae import Pair, bounds, export, latent, testing
from pvae.errors import ContractError, PvaeError, PvaeWarning
from tests import pairs

N, D, Q = 30, 3, 2

pytestmark = pytest.mark.usefixtures("store")


def x_of(mean: float = 0.0) -> Tensor:
    return mean + torch.randn(N, generator=torch.Generator().manual_seed(0))


def model_of(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(x.new_tensor(0.0), 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def said(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(PvaeError):
        warnings.simplefilter("always")
        call()  # which may go on to refuse a training that has nothing to train
    return [str(w.message) for w in caught if issubclass(w.category, PvaeWarning)]


LOOKS: dict[str, Callable[[Any, Tensor], Any]] = {
    "elbo": lambda pair, x: bounds.elbo(pair, x),
    "fit": lambda pair, x: pvae.fit(pair, x, epochs=1, progress=False),
    "diagnose": lambda pair, x: pvae.diagnose(pair, x, checks=["elbo"]),
    "SVI": lambda pair, x: pvae.SVI(
        pair[0], pair[1], pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO()
    ).step(x),
    "export": lambda pair, x: export.to_arviz(
        pair, x, num_particles=2, groups=["posterior"], progress=False
    ),
}


def second_autoguide(kind: Callable[..., AutoGuide], *, by_hand: bool) -> tuple[Any, Any]:
    """The second of two autoguides of the same names; the first is of other data."""
    first = kind(model_of)
    bounds.elbo((model_of, first), x_of())
    second = kind(model_of)
    if by_hand:
        second(x_of(5.0))
    return first, second


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoDelta])
@pytest.mark.parametrize("look", [*LOOKS])
def test_two_autoguides_of_the_same_names_are_said(
    look: str, kind: Callable[..., AutoGuide], by_hand: bool
) -> None:
    first, second = second_autoguide(kind, by_hand=by_hand)
    texts = said(lambda: LOOKS[look]((model_of, second), x_of(5.0)))
    assert any("parameter store had" in t and kind.__name__ in t for t in texts), texts
    ours, theirs = ({id(p) for p in guide.parameters()} for guide in (first, second))
    assert ours == theirs  # which is what was said


def test_autoguides_with_local_parameters_are_apart() -> None:
    """As the message says."""
    x = x_of(), x_of(5.0)
    with pyro.settings.context(module_local_params=True):
        guides = [AutoNormal(model_of), AutoNormal(model_of)]
        before = bounds.elbo((model_of, guides[0]), x[0]).total
        texts = said(
            lambda: pvae.fit((model_of, guides[1]), x[1], epochs=3, lr=0.1, progress=False)
        )
        assert not any("parameter store" in text for text in texts)
        assert bounds.elbo((model_of, guides[0]), x[0]).total == before


def test_an_autoguide_that_was_trained_by_pyro_is_its_own() -> None:
    guide = AutoNormal(model_of)
    svi = pyro.infer.SVI(model_of, guide, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
    svi.step(x_of())
    assert not said(lambda: bounds.elbo((model_of, guide), x_of()))
    assert not said(lambda: bounds.elbo(Pair(model_of, guide), x_of()))  # nor another pair of it


class Scaled(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)


def guide_of(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


@pytest.mark.parametrize("look", [*LOOKS])
def test_two_modules_of_the_same_names_are_said(look: str) -> None:
    first, second = Scaled(), Scaled()
    bounds.elbo((first, guide_of), x_of())
    texts = said(lambda: LOOKS[look]((second, guide_of), x_of()))
    assert len([t for t in texts if "parameter store had 'scale'" in t]) == 1, texts


def announced() -> tuple[Any, Any, nn.Module]:
    encoder, decoder = nn.Linear(D, 2 * Q), nn.Linear(Q, D)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder, update_module_params=TAKES_OVER[0])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder, update_module_params=TAKES_OVER[0])
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, decoder


TAKES_OVER = [False]


@pytest.mark.parametrize("look", [*LOOKS])
def test_a_loaded_store_beside_fresh_networks_is_said(
    look: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(N, D)
    model, guide, _ = announced()
    pvae.fit((model, guide), x, epochs=5, lr=0.05, progress=False)
    fitted = bounds.elbo((model, guide), x).mean
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    fresh = announced()[:2]
    (text,) = said(lambda: LOOKS[look](fresh, x))
    assert "parameter store had 'encoder$$$weight'" in text
    assert "update_module_params=True) takes over what the store has" in text
    monkeypatch.setattr(f"{__name__}.TAKES_OVER", [True])
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bounds.elbo(announced()[:2], x).mean == pytest.approx(fitted)


# Frozen parameters


class Frozen(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = PyroModule[nn.Linear](Q, D)
        self.decoder.weight.requires_grad_(False)  # noqa: FBT003
        self.shift = nn.Parameter(torch.zeros(D), requires_grad=False)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Q), 1.0).to_event(1))
            loc = self.decoder(z) + self.shift
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def called(model: Frozen) -> Any:
    return lambda x: model(x)


def encoder() -> Any:
    network = nn.Linear(D, 2 * Q)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", network)
        with pyro.plate("data", len(x)):
            loc, log_scale = network(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return guide


FROZEN: dict[str, Callable[[Frozen], tuple[Any, Any, Frozen]]] = {
    "module": lambda m: (m, encoder(), m),
    "evaluation mode": lambda m: (m.eval(), encoder(), m),
    "function": lambda m: (called(m), encoder(), m),
    "copy": lambda m: (c := copy.deepcopy(m), encoder(), c),
    "copy after a look": lambda m: (
        (bounds.elbo((m, encoder()), torch.zeros(4, D)) and None)
        or ((c := copy.deepcopy(m)), encoder(), c)
    ),
    "autoguide": lambda m: (m, AutoNormal(m), m),
}


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", [*FROZEN])
@pytest.mark.filterwarnings("ignore::pvae.PvaeWarning")  # networks of one name in the store
@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_what_is_frozen_stays_frozen(name: str, local: bool, device: torch.device) -> None:
    x = torch.randn(N, D)
    with pyro.settings.context(module_local_params=local):
        model, guide, module = FROZEN[name](Frozen())
        weight, bias = module.decoder.weight.detach().clone(), module.decoder.bias.detach().clone()
        pair = Pair(model, guide)
        structure = pair.inspect(x)
        assert not module.decoder.weight.requires_grad
        assert not module.shift.requires_grad
        trained = {id(p) for p in structure.parameters.values()}
        assert id(module.decoder.weight) not in trained
        assert id(module.shift) not in trained
        options: dict[str, Any] = {"batch_size": None, "device": device, "progress": False}
        pvae.fit(pair, x, epochs=2, lr=0.05, **options)
    assert torch.equal(module.decoder.weight.cpu(), weight)
    assert not module.decoder.weight.requires_grad
    assert not module.shift.any()
    if "copy" not in name or local:  # the store trains the tensor of the original
        assert not torch.equal(module.decoder.bias.cpu(), bias)


# Parameters that belong to modules


@pytest.mark.parametrize("name", ["pyro_modules", "two_sites", "labels", "masked", "autoguide"])
@pytest.mark.filterwarnings("ignore::pvae.PvaeWarning")
def test_tools_run_with_pyros_local_parameters(name: str) -> None:
    """And give the numbers that they give without."""
    found = []
    for local in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        with pyro.settings.context(module_local_params=local):
            model, guide, batch = pairs.PAIRS[name](torch.device("cpu"))
            pair = Pair(model, guide)
            numbers = [bounds.elbo(pair, batch, 3).mean]
            numbers.append(bounds.evidence(pair, batch, 3, progress=False).mean)
            history = pvae.fit(pair, batch, epochs=2, engine="eager", progress=False).history
            numbers += history["loss"]
            diagnosis = pvae.diagnose(pair, batch, checks=["elbo", "units", "surgery"])
            numbers += [line.value for line in diagnosis.findings()]
            tree = export.to_arviz(pair, batch, num_particles=2, progress=False)
            numbers += [float(v.mean()) for v in tree["posterior"].data_vars.values()]
            if name != "autoguide":
                numbers.append(
                    float(latent.codes(pair, batch, site=pair.inspect(batch).latents[0]).sum())
                )
            try:
                testing.check_pair(pair, batch)
            except ContractError as error:
                numbers.append(str(error))  # type: ignore[arg-type]
            found.append(numbers)
    assert len(found[0]) > 5
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize("kind", ["PyroModule, local", "autoguide, local"])
def test_exact_pairs_of_modules_with_local_parameters(kind: str) -> None:
    with pyro.settings.context(module_local_params=True):
        if kind == "autoguide, local":
            guide, x = AutoNormal(model_of), x_of()
            variance = 1 / (N + 1 / 100)
            guide(x)
            guide.locs.loc = PyroParam(x.sum() * variance)
            guide.scales.loc = PyroParam(torch.tensor(variance).sqrt(), dist.constraints.positive)
            joint = dist.MultivariateNormal(torch.zeros(N), torch.eye(N) + 100.0).log_prob(x)
            found = bounds.evidence((model_of, guide), x, 3, progress=False)
            assert found.total == pytest.approx(float(joint))
        else:
            x = x_of()
            found = bounds.evidence((Scaled(), guide_of), x, 3, progress=False)
            torch.testing.assert_close(found.per_datum, dist.Normal(0.0, 2**0.5).log_prob(x))
