"""Every rule of the contract of terms."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn

from pvae import VAE, guides, likelihoods, networks, priors, sites
from pvae.conditional import as_conditional
from pvae.data import as_source
from pvae.errors import PairError, PvaeWarning, UndefinedError
from pvae.pair import Pair
from pvae.terms import Evaluation, Terms, compute, stream
from tests import pairs

pytestmark = pytest.mark.usefixtures("store")

Make = Callable[..., pairs.Pair]
ALL = pytest.mark.parametrize("make", pairs.PAIRS.values(), ids=pairs.PAIRS.keys())


def close(a: Tensor | None, b: Tensor | None) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def run(make: Make, device: torch.device, **options: Any) -> Terms:
    model, guide, batch = make(device)
    return compute(Pair(model, guide).inspect(batch), batch, **options)


@ALL
def test_shapes(make: Make, device: torch.device) -> None:
    model, guide, batch = make(device)
    structure = Pair(model, guide).inspect(batch)
    rows = structure.subsample_size or len(batch[0])
    for k in (1, 3):
        terms = compute(structure, batch, num_particles=k)
        assert terms.log_joint.shape == terms.log_q.shape == terms.log_weight.shape == (k, rows)
        assert terms.global_log_p.shape == terms.global_log_q.shape == (k,)
        for site in terms.sites.values():
            for part in (site.log_p, site.log_q):
                assert part is None or part.shape == ((k, rows) if site.is_local else (k,))


@ALL
def test_vectorised_equals_looped(make: Make, device: torch.device) -> None:
    """The same draws, scored at once and one by one, give the same terms site by site."""
    model, guide, batch = make(device)
    structure = Pair(model, guide).inspect(batch)
    both = compute(structure, batch, num_particles=3)
    assert structure.notes["looped_because"] == ""
    for k in range(3):
        given = {
            name: site.value[k]
            for name, site in both.sites.items()
            if site.kind in ("latent", "auxiliary") and site.value is not None
        }
        if structure.subsample_size is not None:
            given["data"] = both.guide_trace.nodes["data"]["value"]
        one = compute(structure, batch, given=given)
        for name, site in both.sites.items():
            for key in ("log_p", "log_q"):
                if getattr(site, key) is not None:
                    close(getattr(site, key)[k], getattr(one.sites[name], key)[0])


@ALL
def test_looping_gives_the_same_shapes_and_kinds(make: Make, device: torch.device) -> None:
    model, guide, batch = make(device)
    structure = Pair(model, guide).inspect(batch)
    at_once = compute(structure, batch, num_particles=3, vectorize=True)
    looped = compute(structure, batch, num_particles=3, vectorize=False)
    assert at_once.sites.keys() == looped.sites.keys()
    for name, site in at_once.sites.items():
        other = looped.sites[name]
        assert (site.kind, site.is_local) == (other.kind, other.is_local)
        if site.value is not None and other.value is not None:
            assert site.value.shape == other.value.shape


@ALL
def test_the_scaled_sum_is_trace_elbo(make: Make, device: torch.device) -> None:
    model, guide, batch = make(device)
    structure = Pair(model, guide).inspect(batch)
    torch.manual_seed(1)
    terms = compute(structure, batch)
    ours = -(terms.scaled("likelihood") + terms.scaled("prior") - terms.scaled("q"))
    torch.manual_seed(1)
    elbo = TraceEnum_ELBO(max_plate_nesting=1) if structure.enumerated else Trace_ELBO()
    assert float(ours.detach()) == pytest.approx(elbo.loss(model, guide, *batch), rel=1e-10)


def test_the_plates_scale_is_removed(device: torch.device) -> None:
    model, guide, batch = pairs.subsample_given(device, n=12, full=100)
    structure = Pair(model, guide).inspect(batch)
    assert (structure.full_size, structure.is_scaled) == (100, True)
    assert structure.removed_scales == {}
    terms = compute(structure, batch)
    z = terms.sites["z"].value
    assert z is not None
    expected = dist.Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(-1)
    close(terms.log_prior, expected)
    close(terms.scaled("prior"), expected.sum(1) * 100 / 12)


class Scaled(pairs.Generator, pairs.Inference):
    def __init__(self, *, is_guide: bool, scale: Any) -> None:
        super().__init__()
        self.is_guide, self.scale = is_guide, scale
        delattr(self, "decoder" if is_guide else "encoder")  # which it has no use for

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=self.scale):
            (self.infer if self.is_guide else self.generate)(x)


@pytest.mark.parametrize("scale", [0.25, torch.linspace(0.1, 0.4, 12, dtype=torch.float64)])
def test_other_scales_are_removed_and_reported(scale: Any, device: torch.device) -> None:
    """A beta-weighted model is not scored as another model."""
    scale = scale.to(device) if isinstance(scale, Tensor) else scale
    model = Scaled(is_guide=False, scale=scale).to(device)
    guide = Scaled(is_guide=True, scale=scale).to(device)
    x = pairs.data(12, device)
    structure = Pair(model, guide).inspect((x,))
    assert structure.removed_scales == {"z": pytest.approx(0.25), "x": pytest.approx(0.25)}
    terms = compute(structure, (x,))
    z = terms.sites["z"].value
    assert z is not None
    close(terms.log_prior, dist.Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(-1))
    close(terms.scaled("prior"), (terms.log_prior * scale).sum(1))


def test_masks_are_applied(device: torch.device) -> None:
    model, guide, batch = pairs.masked(device)
    terms = compute(Pair(model, guide).inspect(batch), batch, num_particles=2)
    keep = batch[1]
    assert (terms.log_joint[:, ~keep] == 0).all()
    assert (terms.log_q[:, ~keep] == 0).all()
    assert (terms.log_joint[:, keep] != 0).all()


class Nested(nn.Module):
    """A second plate inside the data plate, subsampled, and one in which nothing is observed."""

    def __init__(self, *, is_guide: bool, pixels: int | None) -> None:
        super().__init__()
        self.is_guide, self.pixels = is_guide, pixels
        self.weight = nn.Parameter(torch.randn(pairs.D))

    def forward(self, x: Tensor) -> None:
        rows = pyro.plate("data", len(x), dim=-2)
        one = x.new_tensor(1.0)
        with rows:
            z = pyro.sample("z", dist.Normal(self.weight[0] * one, one))
        if not self.is_guide:
            columns = pyro.plate("pixels", pairs.D, subsample_size=self.pixels, dim=-1)
            with rows, columns as index:
                loc = z * self.weight[index]
                pyro.sample("x", dist.Normal(loc, one), obs=x[:, index])


def test_inner_plates_are_summed(device: torch.device) -> None:
    model = Nested(is_guide=False, pixels=None).to(device)
    guide = Nested(is_guide=True, pixels=None).to(device)
    x = pairs.data(12, device)
    terms = compute(Pair(model, guide).inspect((x,)), (x,), num_particles=3)
    z = terms.sites["z"].value
    assert z is not None
    assert z.shape == (3, 12, 1)
    expected = dist.Normal(z * model.weight, 1.0).log_prob(x).sum(-1)
    close(terms.log_likelihood, expected)


def test_a_subsampled_inner_plate_keeps_its_scale(device: torch.device) -> None:
    """Its scale makes the log likelihood unbiased; only the data plate's is removed."""
    model = Nested(is_guide=False, pixels=3).to(device)
    guide = Nested(is_guide=True, pixels=None).to(device)
    x = pairs.data(12, device)
    structure = Pair(model, guide).inspect((x,))
    assert structure.removed_scales == {}
    terms = compute(structure, (x,))
    index = terms.model_trace.nodes["pixels"]["value"]
    z = terms.sites["z"].value
    assert z is not None
    part = dist.Normal(z * model.weight[index], 1.0).log_prob(x[:, index]).sum(-1)
    close(terms.log_likelihood, part * pairs.D / 3)


def test_global_terms_are_apart(device: torch.device) -> None:
    terms = run(pairs.global_latent, device, num_particles=3)
    shift = terms.sites["shift"].value
    assert shift is not None
    assert shift.shape == (3, pairs.D)
    close(terms.global_log_p, dist.Normal(torch.zeros_like(shift), 1.0).log_prob(shift).sum(-1))
    close(terms.log_prior, terms.sites["z"].log_p)
    assert terms.structure.global_latents == ("shift",)


def test_a_given_global_value_is_shared_by_all_particles(device: torch.device) -> None:
    shift = torch.randn(pairs.D, device=device)
    terms = run(pairs.global_latent, device, num_particles=4, given={"shift": shift})
    value = terms.sites["shift"].value
    assert value is not None
    close(value, shift.expand(4, pairs.D))
    z = terms.sites["z"].value
    assert z is not None
    assert (z[0] != z[1]).all()


def test_autoguides_count_their_auxiliary_sites(device: torch.device) -> None:
    """AutoNormal has a Delta at each model site and the density elsewhere; it is no point mass."""
    terms = run(pairs.autoguide, device)
    structure = terms.structure
    assert structure.auxiliary == ("weight_unconstrained", "sigma_unconstrained")
    assert structure.points == frozenset()
    raw = terms.sites["sigma_unconstrained"]
    delta = terms.sites["sigma"]
    assert raw.value is not None
    close(delta.log_q, -raw.value)  # d sigma / d raw = sigma, and the site carries -log of it


class WithDelta(nn.Module):
    def __init__(self, *, kind: str) -> None:
        super().__init__()
        self.kind, self.encoder = kind, nn.Linear(pairs.D, pairs.Q)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            code = self.encoder(x)
            if self.kind == "point":
                fn: Any = dist.Delta(code, event_dim=1)
            elif self.kind == "density":
                fn = dist.Delta(code, log_density=code.sum(-1), event_dim=1)
            elif self.kind == "independent":
                fn = dist.Delta(code).to_event(1)
            else:
                unit = dist.Normal(torch.zeros_like(code), 1.0).to_event(1)
                noise = pyro.sample("noise", unit, infer={"is_auxiliary": True})
                fn = dist.Delta(code + noise, event_dim=1)
            pyro.sample("z", fn)


@pytest.mark.parametrize(
    ("kind", "is_point"),
    [("point", True), ("independent", True), ("density", False), ("fed", False)],
)
def test_a_point_is_a_delta_that_nothing_feeds(
    kind: str, is_point: bool, device: torch.device
) -> None:
    model, _, (x,) = pairs.functions(device)
    guide = WithDelta(kind=kind).to(device)
    structure = Pair(model, guide).inspect((x,))
    assert (structure.points == {"z"}) is is_point
    terms = compute(structure, (x,), num_particles=2)
    if kind == "density":
        close(terms.log_q, guide.encoder(x).sum(-1).expand(2, -1))
    if kind in ("point", "independent"):
        assert (terms.log_q == 0).all()
        with pytest.raises(UndefinedError, match="point mass"):
            structure.require_density("evidence")


class Odd(pairs.Generator, pairs.Inference):
    """Deterministic sites, a marked penalty and an unmarked factor, in model or guide."""

    def __init__(self, *, is_guide: bool) -> None:
        super().__init__()
        self.is_guide = is_guide
        delattr(self, "decoder" if is_guide else "encoder")

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if self.is_guide:
                self.infer(x)
                norm = self.encoder(x).abs().sum(-1)
                sites.penalty("guide_penalty", norm, in_guide=True)
            else:
                self.generate(x)
                pyro.deterministic("mean", x.mean(-1), event_dim=0)
                sites.penalty("model_penalty", x.square().sum(-1))
                pyro.factor("factor", x.abs().sum(-1))


@pytest.mark.parametrize("num_particles", [1, 3])
def test_factors_and_deterministic_sites(num_particles: int, device: torch.device) -> None:
    model, guide = Odd(is_guide=False).to(device), Odd(is_guide=True).to(device)
    x = pairs.data(12, device)
    terms = compute(Pair(model, guide).inspect((x,)), (x,), num_particles=num_particles)
    assert set(terms.sites) == {"z", "x", "factor", "guide_penalty", "model_penalty"}
    z = terms.sites["z"].value
    assert z is not None
    data_term = dist.Normal(model.decoder(z), 1.0).log_prob(x).sum(-1)
    close(terms.log_likelihood, data_term + x.abs().sum(-1))  # unmarked: part of the density
    q = terms.sites["z"].log_q
    close(terms.log_q, q)  # marked: no part of it
    penalties = terms.penalties
    close(penalties["model_penalty"], -x.square().sum(-1).expand(num_particles, -1))
    expected = -guide.encoder(x).abs().sum(-1).expand(num_particles, -1)
    close(penalties["guide_penalty"], expected)
    both = penalties["model_penalty"] + penalties["guide_penalty"]
    close(terms.scaled("penalty"), both.sum(1))


def test_a_guide_penalty_has_a_gradient(device: torch.device) -> None:
    """Without has_rsample the loss would be right and the gradient wrong."""
    model, guide = Odd(is_guide=False).to(device), Odd(is_guide=True).to(device)
    x = pairs.data(12, device)
    terms = compute(Pair(model, guide).inspect((x,)), (x,))
    weight = guide.encoder.weight
    (ours,) = torch.autograd.grad(terms.scaled("penalty").sum(), weight)
    (expected,) = torch.autograd.grad(-guide.encoder(x).abs().sum(), weight)
    close(ours, expected)
    torch.manual_seed(3)
    (through_pyro,) = torch.autograd.grad(Trace_ELBO().differentiable_loss(model, guide, x), weight)
    torch.manual_seed(3)
    terms = compute(Pair(model, guide).inspect((x,)), (x,))
    (all_of_ours,) = torch.autograd.grad(
        (
            terms.scaled("q")
            - terms.scaled("likelihood")
            - terms.scaled("prior")
            - terms.scaled("penalty")
        ).sum(),
        weight,
    )
    close(through_pyro, all_of_ours)


def test_enumerated_latents_are_summed_out(device: torch.device) -> None:
    model, guide, batch = pairs.enumerated(device)
    terms = compute(Pair(model, guide).inspect(batch), batch, num_particles=2)
    z, x = terms.sites["z"].value, batch[0]
    assert z is not None
    log_c = model.logits.log_softmax(-1)
    loc = model.decoder(z)[..., None, :] + model.shift
    each = dist.Normal(loc, 1.0).log_prob(x[:, None, :]).sum(-1) + log_c
    close(terms.log_likelihood, each.logsumexp(-1))
    assert terms.structure.enumerated == ("c",)


class MixturePrior(nn.Module):
    """The enumerated class sits in the prior (``in_data=False``), or in prior and data."""

    def __init__(self, *, in_data: bool) -> None:
        super().__init__()
        self.in_data, self.centers = in_data, nn.Parameter(torch.randn(3, pairs.Q))
        self.decoder = nn.Linear(pairs.Q, pairs.D)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            uniform = dist.Categorical(logits=x.new_zeros(3))
            c = pyro.sample("c", uniform, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.centers[c], 1.0).to_event(1))
            loc = self.decoder(z) + (self.centers[c].sum(-1, keepdim=True) if self.in_data else 0)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("in_data", [False, True])
def test_an_enumerated_prior(in_data: bool, device: torch.device) -> None:
    model = MixturePrior(in_data=in_data).to(device)
    _, guide, (x,) = pairs.enumerated(device)
    terms = compute(Pair(model, guide).inspect((x,)), (x,), num_particles=2)
    z = terms.sites["z"].value
    assert z is not None
    prior = dist.Normal(model.centers, 1.0).log_prob(z[..., None, :]).sum(-1)  # (K, N, C)
    shift = model.centers.sum(-1)[:, None] if in_data else 0.0
    data_term = dist.Normal(model.decoder(z)[..., None, :] + shift, 1.0)
    each = prior + data_term.log_prob(x[:, None, :]).sum(-1)
    close(terms.log_joint, each.logsumexp(-1) - torch.tensor(3.0).log())
    if in_data:
        with pytest.raises(UndefinedError, match="log_joint"):
            _ = terms.log_prior
    else:
        close(terms.log_prior, prior.logsumexp(-1) - torch.tensor(3.0).log())


def test_per_dimension_terms(device: torch.device) -> None:
    model, guide, batch = pairs.masked(device)
    for k in (1, 3):
        terms = compute(
            Pair(model, guide).inspect(batch), batch, num_particles=k, per_dimension=True
        )
        z = terms.sites["z"]
        assert z.log_q_dims is not None
        assert z.log_p_dims is not None
        assert z.log_q_dims.shape == (k, 12, pairs.Q)
        close(z.log_q_dims.sum(-1), z.log_q)
        close(z.log_p_dims.sum(-1), z.log_p)


def test_per_dimension_is_refused_by_name(device: torch.device) -> None:
    class FullRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(pairs.D, pairs.Q)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                scale = torch.eye(pairs.Q, device=x.device)
                pyro.sample("z", dist.MultivariateNormal(self.encoder(x), scale_tril=scale))

    model, _, (x,) = pairs.functions(device)
    with pytest.raises(UndefinedError, match=r"site 'z'.*MultivariateNormal"):
        compute(Pair(model, FullRank().to(device)).inspect((x,)), (x,), per_dimension=True)


def through_latents(
    values: list[Tensor], log_q: Callable[..., Tensor], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """The oracle: partial derivatives of a frozen log q, carried through the draws alone."""
    leaves = [v.detach().requires_grad_() for v in values]
    partial = torch.autograd.grad(log_q(*leaves).sum(), leaves)
    return list(torch.autograd.grad(values, parameters, grad_outputs=partial, retain_graph=True))


def test_the_stopped_guide_keeps_the_path_through_z(device: torch.device) -> None:
    """q(z1) q(z2 | z1): only the parameters are stopped, not what z1 does to q(z2)."""
    model, guide, (x,) = pairs.two_sites(device)
    terms = compute(Pair(model, guide).inspect((x,)), (x,), num_particles=2, stop_guide=True)
    close(terms.stopped_log_q, terms.log_q)
    frozen = copy.deepcopy(guide).requires_grad_(requires_grad=False)

    def log_q(z1: Tensor, z2: Tensor, *, cut: bool = False) -> Tensor:
        loc, log_scale = frozen.first(x).chunk(2, -1)
        total = dist.Normal(loc, log_scale.exp()).log_prob(z1).sum(-1)
        loc, log_scale = frozen.second(z1.detach() if cut else z1).chunk(2, -1)
        return total + dist.Normal(loc, log_scale.exp()).log_prob(z2).sum(-1)

    values = [terms.guide_trace.nodes[name]["value"] for name in ("z1", "z2")]
    parameters = list(guide.parameters())
    expected = through_latents(values, log_q, parameters)
    wrong = through_latents(values, functools.partial(log_q, cut=True), parameters)
    assert terms.stopped_log_q is not None
    ours = torch.autograd.grad(terms.stopped_log_q.sum(), parameters)
    for mine, theirs in zip(ours, expected, strict=True):
        close(mine, theirs)
    assert max((m - w).abs().max() for m, w in zip(ours, wrong, strict=True)) > 0.1
    assert all(p.requires_grad for p in parameters)


def test_the_stopped_guide_of_a_flow(device: torch.device) -> None:
    """A flow has no distribution parameters that could be stopped instead."""
    zuko = pytest.importorskip("zuko", reason="zuko is an extra")
    flow = as_conditional(zuko.flows.MAF(pairs.Q, context=pairs.D, hidden_features=(8,)))
    decoder = likelihoods.Gaussian(networks.MLP(pairs.Q, pairs.D, (8,)), pairs.D, sigma=1.0)
    vae = VAE(priors.StandardNormal(pairs.Q), decoder, flow).to(device)
    x = pairs.data(12, device)
    terms = compute(vae.inspect((x,)), (x,), stop_guide=True)
    torch.testing.assert_close(terms.stopped_log_q, terms.log_q, rtol=1e-5, atol=1e-5)
    frozen = copy.deepcopy(vae.guide).requires_grad_(requires_grad=False)
    values = [terms.guide_trace.nodes["z"]["value"]]
    parameters = list(vae.guide.parameters())
    expected = through_latents(values, lambda z: frozen.posterior(x).log_prob(z), parameters)
    assert terms.stopped_log_q is not None
    ours = torch.autograd.grad(terms.stopped_log_q.sum(), parameters)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# The data plate


class Plates(pairs.Generator):
    """Data in a plate of size 6 beside a plate of the features, 6 as well."""

    def __init__(self, *, is_guide: bool) -> None:
        super().__init__()
        self.is_guide = is_guide
        if is_guide:
            del self.decoder

    def forward(self, x: Tensor) -> None:
        rows, columns = pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", pairs.D, dim=-1)
        with rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(Q := pairs.Q), x.new_ones(Q)).to_event(1))
        if not self.is_guide:
            with rows, columns:
                pyro.sample("x", dist.Normal(self.decoder(z).squeeze(-2), 1.0), obs=x)


def test_two_plates_of_the_batchs_length_are_asked_about(device: torch.device) -> None:
    model, guide = Plates(is_guide=False).to(device), Plates(is_guide=True).to(device)
    x = pairs.data(pairs.D, device)
    with pytest.raises(PairError, match=r"'rows' and 'columns'|'columns' and 'rows'") as error:
        Pair(model, guide).inspect((x,))
    assert "plate=" in str(error.value)
    assert Pair(model, guide, plate="rows").inspect((x,)).dim == -2
    assert Pair(model, guide).inspect((pairs.data(7, device),)).plate == "rows"
    with pytest.raises(PairError, match="'rows' of size 6"):
        Pair(model, guide, plate="data").inspect((x,))


def test_a_site_outside_the_plate_that_reads_what_is_inside_is_refused(
    device: torch.device,
) -> None:
    """Its density belongs to no datum, and none of the others has one of its own."""
    total = torch.tensor(1.0, device=device)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(pairs.Q), x.new_ones(pairs.Q)).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :1], 1.0).expand(x.shape).to_event(1), obs=x)
        pyro.sample("total", dist.Normal(z.sum((-2, -1)), 1.0), obs=total)

    _, guide, (x,) = pairs.functions(device)
    with pytest.raises(PairError, match="depends on them, while the site is outside") as error:
        Pair(model, guide).inspect((x,))
    assert "plate=False" in str(error.value)
    assert not Pair(model, guide, plate=False).inspect((x,)).has_plate


def test_a_latent_without_a_guide_is_refused_by_name(device: torch.device) -> None:
    model, _, batch = pairs.two_sites(device)
    _, guide, _ = pairs.functions(device)
    with pytest.raises(PairError, match="site 'z2'"):
        Pair(model, guide).inspect(batch)


def test_a_guide_site_without_a_model_site_is_refused(device: torch.device) -> None:
    model, guide, batch = pairs.functions(device)

    def more(x: Tensor) -> None:
        guide(x)
        with pyro.plate("others", len(x)):
            pyro.sample("z1", dist.Normal(x.new_tensor(0.0), x.new_tensor(1.0)))

    with pytest.raises(PairError, match=r"guide site 'z1'.*'z' and 'x'"):
        Pair(model, more, plate="data").inspect(batch)


# Vectorised or looped


class BatchSoftmax(pairs.Generator):
    """``softmax(dim=1)`` is over features for (N, D), and over data for (K, N, D)."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(pairs.Q), x.new_ones(pairs.Q)).to_event(1))
            loc = self.decoder(z).softmax(dim=1)
            pyro.sample("x", dist.Normal(loc, x.new_tensor(0.1)).to_event(1), obs=x)


class NoParticles(BatchSoftmax):
    """Fails outright with a third dimension."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(pairs.Q), x.new_ones(pairs.Q)).to_event(1))
            loc = torch.addmm(self.decoder.bias, z, self.decoder.weight.T)
            pyro.sample("x", dist.Normal(loc, x.new_tensor(0.1)).to_event(1), obs=x)


@pytest.mark.parametrize("kind", [BatchSoftmax, NoParticles])
def test_a_decoder_that_cant_take_particles_is_looped(
    kind: type[BatchSoftmax], device: torch.device
) -> None:
    model = kind().to(device)
    _, guide, (x,) = pairs.functions(device)
    structure = Pair(model, guide).inspect((x,))
    with pytest.warns(PvaeWarning, match="looped, not vectorised"):
        terms = compute(structure, (x,), num_particles=3)
    assert len(terms.passes) == 3
    z = terms.sites["z"].value
    assert z is not None
    logits = model.decoder(z)
    loc = logits.softmax(-1) if kind is BatchSoftmax else logits
    close(terms.log_likelihood, dist.Normal(loc, 0.1).log_prob(x).sum(-1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        compute(structure, (x,), num_particles=3)


def test_training_batch_norm_is_looped(device: torch.device) -> None:
    class Normed(networks.MLP):
        def __init__(self) -> None:
            super().__init__(pairs.Q, pairs.D, (8,))
            self.norm = nn.BatchNorm1d(pairs.D)

        def forward(self, x: Tensor, *context: Tensor) -> Tensor:
            y = super().forward(x, *context)
            return self.norm(y.reshape(-1, pairs.D)).reshape(y.shape)

    encoder = networks.MLP(pairs.D, 2 * pairs.Q, (8,))
    vae = VAE(
        priors.StandardNormal(pairs.Q),
        likelihoods.Gaussian(Normed(), pairs.D, sigma=1.0),
        guides.MeanField(encoder, pairs.Q),
    ).to(device)
    x = pairs.data(12, device)
    assert len(compute(vae.inspect((x,)), (x,), num_particles=3).passes) == 3
    vae.eval()
    assert len(compute(vae.inspect((x,)), (x,), num_particles=3).passes) == 1


# Probes and streams


def test_probing_leaves_modes_buffers_and_generators_alone(device: torch.device) -> None:
    decoder = nn.Sequential(nn.Linear(pairs.Q, pairs.D), nn.BatchNorm1d(pairs.D), nn.Dropout())
    decoder.to(device)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(pairs.Q), x.new_ones(pairs.Q)).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    _, guide, (x,) = pairs.functions(device)
    state = torch.get_rng_state()
    structure = Pair(model, guide).inspect((x,))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in decoder.modules())
    norm = decoder[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked == 0
    assert decoder[2] in structure.modules  # found though it is hidden in a closure


@ALL
def test_streams_visit_every_datum_once(make: Make, device: torch.device) -> None:
    model, guide, batch = make(device)
    source = as_source(batch, device, torch.float64)
    structure = Pair(model, guide).inspect_source(source)
    seen = torch.zeros(source.num_rows)
    for rows, terms in stream(
        Evaluation(Pair(model, guide), structure, source, 15), num_particles=3
    ):
        size = rows.stop - rows.start
        assert terms.log_weight.shape[1] == size
        assert not terms.log_weight.requires_grad
        if structure.subsample_size is None:
            assert size * terms.num_particles <= 15
        seen[rows] += terms.num_particles
    assert (seen == 3).all()


def test_a_self_subsampling_pair_is_visited_in_order(device: torch.device) -> None:
    model, guide, (x,) = pairs.subsample_drawn(device, n=12, size=5)
    source = as_source(x, device, torch.float64)
    structure = Pair(model, guide).inspect_source(source)
    values = torch.zeros(12, pairs.Q, device=device)
    log_q = torch.zeros(12, device=device)
    for rows, terms in stream(Evaluation(Pair(model, guide), structure, source)):
        site = terms.sites["z"]
        assert site.value is not None
        values[rows], log_q[rows] = site.value[0], terms.log_q[0]
    loc, log_scale = guide.encoder(x).chunk(2, -1)
    close(log_q, dist.Normal(loc, log_scale.exp()).log_prob(values).sum(-1))


def test_memory_is_bounded_by_rows_and_not_by_particles(device: torch.device) -> None:
    model, guide, (x,) = pairs.functions(device, n=40)
    source = as_source(x, device, torch.float64)
    structure = Pair(model, guide).inspect_source(source)
    sizes = [
        terms.log_weight.numel()
        for _, terms in stream(
            Evaluation(Pair(model, guide), structure, source, 64), num_particles=500
        )
    ]
    assert max(sizes) <= 64
    assert sum(sizes) == 500 * 40


# Found by trying to break it


class Named(pairs.Generator, pairs.Inference):
    """A plate of any name, scale and place, for model or guide."""

    def __init__(self, *, is_guide: bool, plate: str = "data", full: int | None = None) -> None:
        super().__init__()
        self.is_guide, self.plate, self.full = is_guide, plate, full
        delattr(self, "decoder" if is_guide else "encoder")  # which it has no use for

    def forward(self, x: Tensor) -> None:
        size = None if self.full is None else len(x)
        with pyro.plate(self.plate, self.full or len(x), subsample_size=size):
            (self.infer if self.is_guide else self.generate)(x)


def test_plates_may_have_different_names(device: torch.device) -> None:
    model = Named(is_guide=False, plate="rows").to(device)
    guide = Named(is_guide=True, plate="guide_rows").to(device)
    x = pairs.data(12, device)
    for plate in (None, "rows", "guide_rows"):
        structure = Pair(model, guide, plate=plate).inspect((x,))
        torch.manual_seed(0)
        terms = compute(structure, (x,))
        torch.manual_seed(0)
        with pyro.validation_enabled(is_validate=False):  # Pyro warns of the names
            expected = Trace_ELBO().loss(model, guide, x)
        assert float(terms.log_weight.sum().detach()) == pytest.approx(-expected)


@pytest.mark.parametrize("full", [100, 12])
def test_plates_of_different_scales_are_refused(full: int, device: torch.device) -> None:
    model = Named(is_guide=False, full=full).to(device)
    guide = Named(is_guide=True, full=200).to(device)
    with pytest.raises(PairError, match="one full size in model and guide"):
        Pair(model, guide).inspect((pairs.data(12, device),))


def test_a_likelihood_after_the_plate_is_refused(device: torch.device) -> None:
    """Its indentation lost, x would count as a global site and every bound be wrong."""
    decoder = nn.Linear(pairs.Q, pairs.D).to(device)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(pairs.Q), x.new_ones(pairs.Q)).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(2), obs=x)

    _, guide, (x,) = pairs.functions(device)
    with pytest.raises(PairError, match=r"observed site 'x'.*around it: it has 12 rows"):
        Pair(model, guide).inspect((x,))


@pytest.mark.parametrize("event_dim", [0, 2])
def test_a_missing_or_extra_event_dimension_is_refused(
    event_dim: int, device: torch.device
) -> None:
    """Never summed out as if it were an enumerated latent."""
    decoder = nn.Linear(pairs.Q, 6).to(device)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(pairs.Q), x.new_ones(pairs.Q)).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(event_dim), obs=x)

    _, guide, (x,) = pairs.functions(device, n=6)
    with pytest.raises(PairError, match=r"x|model"):
        Pair(model, guide).inspect((x,))


def test_model_and_guide_swapped_are_refused(device: torch.device) -> None:
    model, guide, batch = pairs.functions(device)
    with pytest.raises(PairError, match="are they swapped"):
        Pair(guide, model).inspect(batch)


def test_a_latent_local_in_one_program_alone_is_refused(device: torch.device) -> None:
    model, _, (x,) = pairs.functions(device)

    def guide(x: Tensor) -> None:
        with pyro.plate("others", 3):
            pyro.sample("y", dist.Normal(x.new_zeros(()), 1.0), infer={"is_auxiliary": True})
        loc = pyro.param("loc", x.new_zeros(len(x), pairs.Q))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(2))

    with pytest.raises(PairError):
        Pair(model, guide).inspect((x,))


def test_data_in_the_guide_are_refused(device: torch.device) -> None:
    model, guide, (x,) = pairs.functions(device)

    def observing(x: Tensor) -> None:
        guide(x)
        with pyro.plate("data2", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(pairs.D), 1.0).to_event(1), obs=x)

    with pytest.raises(PairError, match=r"guide site 'x'.*observed data"):
        Pair(model, observing, plate="data").inspect((x,))


def test_padding_under_an_enumerated_latent_counts_nothing(device: torch.device) -> None:
    x = torch.tensor([0.3, -0.2, 9.0, 9.0], device=device)
    keep = torch.tensor([True, True, False, False], device=device)
    centers = torch.tensor([-1.0, 0.0, 1.0], device=device)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=keep[: len(x)]):
            uniform = dist.Categorical(x.new_ones(3))
            c = pyro.sample("c", uniform, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(centers[c], x.new_tensor(1.0)), obs=x)

    terms = compute(Pair(model, lambda x: None).inspect((x,)), (x,))
    each = dist.Normal(centers, 1.0).log_prob(x[:2, None]).logsumexp(1) - torch.tensor(3.0).log()
    close(terms.log_joint[0, :2], each)
    close(terms.log_joint[0, 2:], torch.zeros(2, device=device))


def test_one_scale_inside_a_logarithm(device: torch.device) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            uniform = dist.Categorical(x.new_ones(3))
            c = pyro.sample("c", uniform, infer={"enumerate": "parallel"})
            with poutine.scale(scale=2.0):
                pyro.sample("x", dist.Normal(c.to(x.dtype), x.new_tensor(1.0)), obs=x[:, 0])

    with pytest.raises(PairError, match="one common scale"):
        compute(
            Pair(model, lambda x: None).inspect((pairs.data(5, device),)), (pairs.data(5, device),)
        )


def test_more_kinds_of_point_masses(device: torch.device) -> None:
    model, _, (x,) = pairs.functions(device)
    code = x[:, : pairs.Q]

    def masked(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            keep = torch.ones(len(x), dtype=torch.bool, device=x.device)
            pyro.sample("z", dist.Delta(x[:, : pairs.Q], event_dim=1).mask(keep))

    assert Pair(model, masked).inspect((x,)).points == {"z"}

    def switched(x: Tensor) -> None:
        """A coin that shows the same side nearly always feeds the point."""
        with pyro.plate("data", len(x)):
            coin = dist.Bernoulli(x.new_tensor(1e-9))
            side = pyro.sample("side", coin, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(x[:, : pairs.Q] + side[:, None], event_dim=1))

    assert Pair(model, switched).inspect((x,)).points == set()
    assert code.shape == (12, pairs.Q)


class CachingFlow(nn.Module):
    """A guide with one of Pyro's own flows, which caches the last draw and its log density."""

    def __init__(self, kind: str = "affine_autoregressive") -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(pairs.Q))
        self.flow = getattr(dist.transforms, kind)(pairs.Q)

    def forward(self, x: Tensor) -> None:
        base = dist.Normal(self.loc + x[:, : pairs.Q], 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


def test_the_stopped_guide_of_a_caching_flow(device: torch.device) -> None:
    model, _, (x,) = pairs.functions(device)
    guide = CachingFlow().to(device)
    frozen = copy.deepcopy(guide).requires_grad_(requires_grad=False)
    terms = compute(Pair(model, guide).inspect((x,)), (x,), stop_guide=True)
    close(terms.stopped_log_q, terms.log_q)

    def log_q(z: Tensor) -> Tensor:
        base = dist.Normal(frozen.loc + x[:, : pairs.Q], 1.0).to_event(1)
        return dist.TransformedDistribution(base, [frozen.flow]).log_prob(z)

    values = [terms.guide_trace.nodes["z"]["value"]]
    parameters = list(guide.parameters())
    expected = through_latents(values, log_q, parameters)
    assert terms.stopped_log_q is not None
    ours = torch.autograd.grad(terms.stopped_log_q.sum(), parameters)
    for mine, theirs in zip(ours, expected, strict=True):
        close(mine, theirs)


def test_the_stopped_pass_drops_the_same_units_and_moves_no_statistics(
    device: torch.device,
) -> None:
    class Noisy(pairs.Inference):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(pairs.D), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                self.infer(self.drop(self.norm(x)))

    model, _, (x,) = pairs.functions(device)
    guide = Noisy().to(device)
    terms = compute(Pair(model, guide).inspect((x,)), (x,), stop_guide=True)
    close(terms.stopped_log_q, terms.log_q)
    assert guide.norm.num_batches_tracked == 1


def test_a_flow_that_cant_be_inverted_is_scored_by_its_own_draws(device: torch.device) -> None:
    model, _, (x,) = pairs.functions(device)
    guide = CachingFlow("planar").to(device)
    structure = Pair(model, guide).inspect((x,))
    torch.manual_seed(3)
    terms = compute(structure, (x,), num_particles=3)
    torch.manual_seed(3)
    base = dist.Normal(guide.loc + x[:, : pairs.Q], 1.0).to_event(1).expand((3, 12))
    before = base.rsample()
    after = guide.flow(before)
    drawn = terms.sites["z"].value
    assert drawn is not None
    assert torch.equal(drawn, after)
    close(terms.log_q, base.log_prob(before) - guide.flow.log_abs_det_jacobian(before, after))


def test_values_have_data_second_whatever_the_plates(device: torch.device) -> None:
    """Parts left of the data: value (K, N, parts, ...)."""

    def model(x: Tensor) -> None:
        data_plate = pyro.plate("data", len(x), dim=-1)
        with pyro.plate("parts", 4, dim=-2), data_plate:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with data_plate:
            pyro.sample("x", dist.Normal(z.sum((-1, -3)), 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", x.new_tensor(0.5))
        with pyro.plate("parts", 4, dim=-2), pyro.plate("data", len(x), dim=-1):
            loc = x[:, :1].expand(4, len(x), 1) * torch.ones(2, device=x.device)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    x = pairs.data(7, device)
    for k in (1, 3):
        z = compute(Pair(model, guide).inspect((x,)), (x,), num_particles=k, vectorize=False).sites[
            "z"
        ]
        assert z.value is not None
        assert z.value.shape == (k, 7, 4, 2)
        assert z.log_q is not None
        total = dist.Normal(x[:, 0, None, None], 0.5).log_prob(z.value).sum((-1, -2))
        close(z.log_q, total)


def test_a_guides_wish_to_be_enumerated_is_answered(device: torch.device) -> None:
    """Where Pyro lists no states it is drawn."""
    model, _, (x,) = pairs.discrete(device)

    def guide(x: Tensor) -> None:
        logits = pyro.param("logits", x.new_zeros(pairs.Q))
        with pyro.plate("data", len(x)):
            fn = dist.Bernoulli(logits=logits).to_event(1)
            pyro.sample("z", fn, infer={"enumerate": "parallel"})

    with pytest.warns(PvaeWarning, match="and is drawn: Pyro lists no states"):
        structure = Pair(model, guide).inspect((x,))
    assert structure.guide_states == ()
