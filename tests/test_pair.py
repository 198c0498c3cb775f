"""The pair: what is found out about two programs, once, and when it is forgotten."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

import pvae
from pvae import VAE, Pair, bounds, diagnostics, guides, latent, likelihoods, priors, testing
from pvae.errors import ArgumentError, ContractError, DataError, PairError, PvaeWarning
from pvae.pair import as_pair

D, Q, N = 6, 2, 12
pytestmark = pytest.mark.usefixtures("store")


def x_of(n: int = N) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(n))


def vae() -> VAE:
    return VAE(
        priors.StandardNormal(Q),
        likelihoods.Gaussian(nn.Linear(Q, D), D, sigma=1.0),
        guides.MeanField(nn.Linear(D, 2 * Q), Q),
    )


class Networks(nn.Module):
    """Networks that are reached by methods of their own, as in PyTorch's example of a VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.decoder = (
            nn.Linear(D, 8),
            nn.Linear(8, 2 * Q),
            nn.Linear(Q, D),
        )

    def encode(self, x: Tensor) -> Tensor:
        hidden = F.dropout(torch.tanh(self.first.forward(x)), 0.5, self.training)
        return self.second.forward(hidden)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder.forward(z)

    def model(self, x: Tensor) -> None:
        pyro.module("networks", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("networks", self)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def programs(networks: Networks) -> dict[str, Callable[[], Pair]]:
    """The same networks, reached in each way that a program may have."""

    def model(x: Tensor) -> None:
        networks.model(x)

    def guide(x: Tensor) -> None:
        networks.guide(x)

    def of(who: Networks, x: Tensor, what: str) -> None:
        getattr(who, what)(x)

    return {
        "closures": lambda: Pair(model, guide),
        "bound methods": lambda: Pair(networks.model, networks.guide),
        "an object with both": lambda: as_pair(networks),
        "partials": lambda: Pair(
            partial(of, networks, what="model"), partial(of, networks, what="guide")
        ),
        "defaults": lambda: Pair(
            lambda x, n=networks: n.model(x), lambda x, n=networks: n.guide(x)
        ),
        "a handler around": lambda: Pair(
            pyro.poutine.scale(networks.model, 1.0), pyro.poutine.scale(networks.guide, 1.0)
        ),
    }


@pytest.mark.parametrize("way", [*programs(Networks())])
def test_networks_are_found_however_programs_reach_them(way: str) -> None:
    """In evaluation mode dropout is off: the bound is that of networks without any."""
    torch.manual_seed(0)
    networks = Networks()
    pair, x = programs(networks)[way](), x_of()
    structure = pair.inspect(x)
    assert {id(m) for m in structure.modules} >= {id(m) for m in networks.modules()}
    assert len(structure.parameters) == 6
    networks.train()
    in_training = bounds.elbo(pair, x, 20)
    networks.eval()
    assert bounds.elbo(pair, x, 20).mean == pytest.approx(in_training.mean, abs=1e-12)
    networks.train()
    assert networks.training  # the mode is the caller's again
    assert all(m.training for m in networks.modules())


def test_what_a_look_finds_is_remembered() -> None:
    pair, x = vae(), x_of()
    structure = pair.inspect(x)
    assert pair.inspect(x) is structure
    assert pair.inspect(x_of(N)) is structure  # other values, the same shape
    assert pair.inspect(x_of(5)) is not structure
    assert pair.inspect(x) is structure


def _freeze(pair: VAE) -> None:
    for parameter in pair.model.parameters():
        parameter.requires_grad_(requires_grad=False)


def _replace(pair: VAE) -> None:
    pair.model.likelihood.network = nn.Linear(Q, D)


def _add(pair: VAE) -> None:
    pair.guide.posterior.network = nn.Sequential(pair.guide.posterior.network, nn.Linear(4, 4))


@pytest.mark.parametrize("change", [_freeze, _replace, _add])
def test_it_is_forgotten_when_networks_change(change: Callable[[VAE], None]) -> None:
    pair, x = vae(), x_of()
    before = pair.inspect(x)
    change(pair)
    now = pair.inspect(x)
    assert now is not before
    trainable = {id(p) for p in pair.parameters() if p.requires_grad}
    assert {id(p) for p in now.parameters.values()} == trainable


def test_it_is_forgotten_when_pyros_store_is_cleared() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    pair, x = Pair(model, guide), torch.zeros(4)
    before = pair.inspect(x).parameters["loc"]
    pyro.clear_param_store()
    assert pair.inspect(x).parameters["loc"] is not before


def test_a_copy_remembers_nothing_of_the_original() -> None:
    pair, x = vae(), x_of()
    pair.inspect(x)
    other = copy.deepcopy(pair)
    theirs = {id(p) for p in other.inspect(x).parameters.values()}
    assert theirs == {id(p) for p in other.parameters()}
    assert not theirs & {id(p) for p in pair.parameters()}


def test_a_pair_lives_where_its_tensors_are() -> None:
    pair = vae().double()
    x = x_of().double()
    assert pair.inspect(x).dtype == torch.float64
    _freeze(pair)
    for parameter in pair.guide.parameters():
        parameter.requires_grad_(requires_grad=False)
    structure = pair.inspect(x)  # not one trainable parameter
    assert structure.parameters == {}
    assert (structure.dtype, structure.device.type) == (torch.float64, "cpu")


def test_a_plate_that_lengths_cannot_tell_is_named_once() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("columns", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        variance = 1 / (1 + x.shape[1])
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.sum(1, keepdim=True) * variance, variance**0.5))

    x = torch.randn(D, D, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PairError, match="plate"):
        bounds.evidence((model, guide), x, 5)
    pair = Pair(model, guide, plate="rows")
    exact = dist.MultivariateNormal(torch.zeros(D), torch.eye(D) + 1.0).log_prob(x)
    found = bounds.evidence(pair, x, 5)  # the guide is the posterior
    torch.testing.assert_close(found.values, exact, rtol=1e-10, atol=1e-10)


# What is odd about the parameters


def _unannounced() -> Pair:
    encoder, decoder = nn.Linear(D, 2 * Q), nn.Linear(Q, D)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder.forward(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Pair(model, guide)


class _Stored(PyroModule):
    def __init__(self, *, is_guide: bool) -> None:
        super().__init__()
        self.is_guide, self.network = is_guide, nn.Linear(*((D, 2 * Q) if is_guide else (Q, D)))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if self.is_guide:
                loc, log_scale = self.network(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            else:
                z = pyro.sample("z", dist.Normal(x.new_zeros(Q), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.network(z), 1.0).to_event(1), obs=x)


def _taken() -> Pair:
    """A second pair of the same names as one that ran before it: the store has the first's."""
    networks = [nn.Linear(Q, D), nn.Linear(Q, D)]
    encoder = nn.Linear(D, 2 * Q)

    def model(x: Tensor, decoder: nn.Module) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    pairs = [Pair(partial(model, decoder=network), guide) for network in networks]
    pairs[0].inspect(x_of())
    return pairs[1]


def _idle() -> Pair:
    pair = vae()
    pair.model.spare = nn.Linear(3, 3)
    return pair


ODD = {
    "unannounced": (_unannounced, "no program announces them"),
    "taken": (_taken, r"parameter store had 'decoder\$\$\$weight'"),
    "idle": (_idle, "Nothing in the pair uses the parameters of 'spare'"),
}
LOOKS: dict[str, Callable[[Pair, Tensor], object]] = {
    "elbo": lambda pair, x: bounds.elbo(pair, x),
    "codes": lambda pair, x: latent.codes(pair, x),
    "surgery": lambda pair, x: diagnostics.surgery(pair, x),
    "check_pair": lambda pair, x: testing.check_pair(pair, x),
    "fit": lambda pair, x: pvae.fit(pair, x, epochs=1, progress=False),
}


@pytest.mark.parametrize("odd", [*ODD])
@pytest.mark.parametrize("look", [*LOOKS])
def test_what_is_odd_is_said_once_by_whichever_tool_looks_first(odd: str, look: str) -> None:
    make, words = ODD[odd]
    pair, x = make(), x_of()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            LOOKS[look](pair, x)
        except ContractError:
            assert look == "check_pair"  # which goes on to refuse what has no gradient
    said = [w for w in caught if issubclass(w.category, PvaeWarning)]
    assert len([w for w in said if re.search(words, str(w.message))]) == 1
    assert all(w.filename == __file__ for w in said), [w.filename for w in said]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bounds.elbo(pair, x)  # not again


def test_a_usual_pair_has_nothing_odd() -> None:
    assert vae().inspect(x_of()).oddities == ()
    pair = Pair(_Stored(is_guide=False), _Stored(is_guide=True))
    assert pair.inspect(x_of()).oddities == ()


# What is taken as a pair


class Both:
    """Programs as methods, as in Pyro's tutorial of the VAE."""

    def model(self, x: Tensor) -> None:
        vae_of_both.model(x)

    def guide(self, x: Tensor) -> None:
        vae_of_both.guide(x)


vae_of_both = vae()


@pytest.mark.parametrize(
    "thing",
    [vae_of_both, (vae_of_both.model, vae_of_both.guide), Both()],
    ids=["VAE", "tuple", "object"],
)
def test_what_is_taken_as_a_pair(thing: object) -> None:
    x = x_of().to(next(vae_of_both.parameters()).dtype)
    expected = bounds.elbo(vae_of_both, x)
    found = bounds.elbo(thing, x)  # type: ignore[arg-type]
    assert found.mean == expected.mean


@pytest.mark.parametrize("thing", [nn.Linear(1, 1), "vae", (print,), None, (print, 3)])
def test_what_is_no_pair_is_refused_with_the_line_that_works(thing: object) -> None:
    with pytest.raises(ArgumentError, match=r"elbo\(\(model, guide\), ...\)"):
        bounds.elbo(thing, x_of())  # type: ignore[arg-type]


@pytest.mark.parametrize("program", [3, nn.Linear])
def test_programs_have_to_be_callable_and_made(program: object) -> None:
    with pytest.raises(ArgumentError, match="Pair, model"):
        Pair(program, print)  # type: ignore[arg-type]


def test_an_option_that_is_the_pairs_says_so() -> None:
    with pytest.raises(TypeError, match=r"pvae.Pair\(model, guide, plate=...\)"):
        bounds.elbo(vae(), x_of(), plate="data")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean max_rows="):
        bounds.elbo(vae(), x_of(), maxrows=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("local", [False, True])
def test_pyro_modules_in_functions_run_with_pyros_local_names(
    local: bool, device: torch.device
) -> None:
    """Networks of one name in model and guide are two, and each is trained."""

    class Decoder(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(Q, D)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(Q), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    class Encoder(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(D, 2 * Q)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                loc, log_scale = self.net(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    with pyro.settings.context(module_local_params=local):
        decoder, encoder, x = Decoder().to(device), Encoder().to(device), x_of()
        pair = Pair(decoder, encoder)
        if local:
            pair = Pair(lambda x: decoder(x), lambda x: encoder(x))
        before = [p.detach().clone() for m in (decoder, encoder) for p in m.parameters()]
        pvae.fit(pair, x, epochs=2, progress=False, engine="eager", device=device)
        after = [p for m in (decoder, encoder) for p in m.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_it_is_forgotten_when_a_setting_of_the_program_changes() -> None:
    """A global latent that a flag turns on makes the bound one of the whole data set."""

    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.has_mean, self.rows = False, "data"

        def model(self, x: Tensor) -> None:
            loc = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0)) if self.has_mean else 0.0
            with pyro.plate(self.rows, len(x)):
                z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
                pyro.sample("x", dist.Normal(loc + z, 1.0), obs=x[:, 0])

        def guide(self, x: Tensor) -> None:
            if self.has_mean:
                pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))
            with pyro.plate(self.rows, len(x)):
                pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.5**0.5))

    programs, x = Switched(), x_of()
    pair = Pair(programs.model, programs.guide)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x[:, 0]).mean()
    torch.testing.assert_close(bounds.elbo(pair, x).mean, float(exact))
    programs.rows = "rows"
    torch.testing.assert_close(bounds.elbo(pair, x).mean, float(exact))
    programs.has_mean = True
    assert bounds.elbo(pair, x, 20).global_sites == ("m",)


def test_a_batch_whose_parts_change_in_place_is_looked_at_again() -> None:
    def model(x: Tensor, options: dict[str, bool]) -> None:
        with pyro.plate("data", len(x)):
            if options["two"]:
                pyro.sample("w", dist.Normal(x.new_tensor(0.0), 1.0))
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x: Tensor, options: dict[str, bool]) -> None:
        with pyro.plate("data", len(x)):
            for name in ("z", "w") if options["two"] else ("z",):
                pyro.sample(name, dist.Normal(x[:, 0] / 2, 0.5**0.5))

    pair, options = Pair(model, guide), {"two": False}
    assert pair.inspect((x_of(), options)).latents == ("z",)
    options["two"] = True
    assert pair.inspect((x_of(), options)).latents == ("w", "z")


def test_networks_of_training_alone_and_fixed_features_are_not_odd() -> None:
    """The one is used by a penalty, which evaluation leaves out; the other isn't to be trained."""

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.norm = nn.Linear(Q, D), nn.BatchNorm1d(Q)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(Q), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)
                if self.training:
                    pyro.factor("penalty", -self.norm(z).square().sum(-1))

    fixed, network = nn.Linear(D, D), nn.Linear(D, 2 * Q)

    def guide(x: Tensor) -> None:
        pyro.module("network", network)
        with torch.no_grad():
            features = fixed(x)
        with pyro.plate("data", len(x)):
            loc, log_scale = network(features).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    model = Penalised()
    assert Pair(model, guide).inspect(x_of()).oddities == ()
    assert model.training
    assert model.norm.running_mean is not None
    assert not model.norm.running_mean.any()  # a look leaves no trace


def test_a_seed_may_be_an_integer_of_numpys() -> None:
    pair, x = vae(), x_of()
    assert bounds.elbo(pair, x, seed=np.int64(3)).mean == bounds.elbo(pair, x, seed=3).mean  # type: ignore[arg-type]


def test_data_are_checked_again_for_another_likelihood() -> None:
    pair, source = vae(), pvae.data.as_source(x_of(), dtype=torch.float64)
    bounds.elbo(pair, source)
    pair.model.likelihood = likelihoods.Bernoulli(nn.Linear(Q, D), D)
    with pytest.raises(DataError, match="row 0"):
        bounds.elbo(pair, source)
