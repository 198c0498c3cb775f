"""States summed out and averaged over: chains, topics of words, animals, mixtures.

Against enumeration of all states, the forward algorithm, and Pyro's own ``TraceEnum_ELBO``.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.nn import functional as F

import pvae
from pvae import Pair, bounds, export, fit, objectives, terms
from pvae.errors import PairError, UndefinedError
from pvae.objectives import as_objective
from pvae.sites import PENALTY

pytestmark = pytest.mark.usefixtures("store")

N, T, STATES = 5, 4, 3
DOUBLE: Any = {"dtype": torch.float64}
MOVE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], **DOUBLE)
LOCS = torch.tensor([-1.5, 0.0, 2.0], **DOUBLE)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def nothing(*_: Any) -> None:
    """A guide for a model that sums all of its latents out."""


def chain(x: Tensor) -> None:
    """A hidden Markov model, a sequence a datum."""
    move = pyro.param("move", MOVE.clone(), constraint=constraints.simplex)
    locs = pyro.param("locs", LOCS.clone())
    with pyro.plate("data", len(x)):
        z: Any = 0
        for t in pyro.markov(range(x.shape[1])):
            fn = dist.Categorical(move[z])
            z = pyro.sample(f"z{t}", fn, infer={"enumerate": "parallel"})
            pyro.sample(f"x{t}", dist.Normal(locs[z], 1.0), obs=x[:, t])


def forward(x: Tensor) -> Tensor:
    """log p of each sequence by the forward algorithm."""
    emit = dist.Normal(LOCS, 1.0).log_prob(x[..., None])
    alpha = MOVE[0].log() + emit[:, 0]
    for t in range(1, x.shape[1]):
        alpha = (alpha[..., None] + MOVE.log()).logsumexp(-2) + emit[:, t]
    return alpha.logsumexp(-1)


def check_fit(model: Any, guide: Any, batch: tuple[Any, ...], *, is_exact: bool) -> None:
    """`pvae.SVI` moves parameters as Pyro's SVI does; `fit` too, where nothing is drawn."""
    found = []
    adam = {"lr": 0.01, "eps": 1e-8 * len(batch[0])}  # fit divides the loss by the rows
    kinds: list[Any] = [SVI, pvae.SVI, fit]
    for kind in kinds[: 2 + is_exact]:
        pyro.clear_param_store()
        torch.manual_seed(1)
        if kind is fit:
            how: dict[str, Any] = {"epochs": 3, "batch_size": None, "lr": 0.01, "progress": False}
            fit((model, guide), batch, TraceEnum_ELBO(), **how)
        else:
            svi = kind(model, guide, pyro.optim.Adam(adam), TraceEnum_ELBO())
            for _ in range(3):
                svi.step(*batch)
        store = pyro.get_param_store()
        found.append({name: p.detach().clone() for name, p in store.named_parameters()})
    for ours in found[1:]:
        assert ours.keys() == found[0].keys()
        for name, theirs in found[0].items():
            torch.testing.assert_close(ours[name], theirs, rtol=1e-9, atol=1e-9)


def check_loss(
    model: Any, guide: Any, batch: tuple[Any, ...], depth: int, theirs: Any = None
) -> None:
    """Our ELBO and its gradients are those of Pyro's, by the same seed."""
    found = []
    of_pyro = theirs or TraceEnum_ELBO(max_plate_nesting=depth)
    ours = objectives.ELBO() if theirs is None else as_objective(theirs)
    ours.loss(model, guide, *batch)  # looks at the pair
    for elbo in (of_pyro, ours):
        for _, p in pyro.get_param_store().named_parameters():
            p.grad = None
        torch.manual_seed(2)
        loss = elbo.loss_and_grads(model, guide, *batch)
        grads = {n: p.grad for n, p in pyro.get_param_store().named_parameters()}
        found.append((loss, {n: g.clone() for n, g in grads.items() if g is not None}))
    (their_loss, their_grads), (our_loss, our_grads) = found
    assert our_loss == pytest.approx(their_loss, rel=1e-10)
    assert their_grads
    for name, gradient in their_grads.items():
        torch.testing.assert_close(our_grads[name], gradient, rtol=1e-7, atol=1e-9)


def test_a_chain_is_the_forward_algorithm() -> None:
    x = noise(N, T)
    for found in (bounds.elbo((chain, nothing), x), bounds.evidence((chain, nothing), x, 2)):
        torch.testing.assert_close(found.values, forward(x), rtol=1e-10, atol=1e-10)
    check_loss(chain, nothing, (x,), 1)


def test_a_long_chain_costs_what_a_chain_costs() -> None:
    """Not 3^60 terms."""
    x = noise(2, 60)
    torch.testing.assert_close(bounds.elbo((chain, nothing), x).values, forward(x))


def test_chains_are_trained_as_by_pyro() -> None:
    check_fit(chain, nothing, (noise(N, T),), is_exact=True)


def second_order(x: Tensor) -> None:
    """Each state depends on the two before it."""
    with pyro.plate("data", len(x)):
        a: Any = torch.tensor(0)
        b: Any = torch.tensor(0)
        for t in pyro.markov(range(x.shape[1]), history=2):
            probs = Vindex(TABLE)[a, b]
            c = pyro.sample(f"z{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
            pyro.sample(f"x{t}", dist.Normal(LOCS[c], 1.0), obs=x[:, t])
            a, b = b, c


TABLE = torch.softmax(noise(STATES, STATES, STATES, seed=9), -1)


def test_a_chain_of_second_order_by_all_paths() -> None:
    x = noise(N, T)
    paths = torch.tensor([*itertools.product(range(STATES), repeat=T)])
    total = dist.Normal(LOCS[paths], 1.0).log_prob(x[:, None]).sum(-1)
    before = torch.cat([torch.zeros(len(paths), 2, dtype=torch.long), paths], 1)
    for t in range(T):
        total = total + TABLE[before[:, t], before[:, t + 1], paths[:, t]].log()
    found = bounds.elbo((second_order, nothing), x).values
    torch.testing.assert_close(found, total.logsumexp(1), rtol=1e-10, atol=1e-10)


def padded(x: Tensor, lengths: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z: Any = 0
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                fn = dist.Categorical(MOVE[z])
                z = pyro.sample(f"z{t}", fn, infer={"enumerate": "parallel"})
                pyro.sample(f"x{t}", dist.Normal(LOCS[z], 1.0), obs=x[:, t])


def test_padding_of_a_chain_counts_nothing() -> None:
    x, lengths = noise(N, T), torch.tensor([1, 4, 2, 3, 4])
    expected = torch.cat([forward(one[None, :n]) for one, n in zip(x, lengths, strict=True)])
    torch.testing.assert_close(bounds.elbo((padded, nothing), (x, lengths)).values, expected)


def test_masks_of_observed_chains_have_no_states() -> None:
    """An export has what was observed, with NaN where padding was."""
    x, lengths = noise(N, T), torch.tensor([1, 4, 2, 3, 4])
    tree = export.to_arviz((padded, nothing), (x, lengths), num_particles=3, progress=False)
    for t in range(T):
        expected = torch.where(t < lengths, x[:, t], math.nan)
        found = torch.as_tensor(tree["observed_data"][f"x{t}"].to_numpy())
        torch.testing.assert_close(found, expected, equal_nan=True)


def tones(x: Tensor) -> None:
    """As in music: a chain for each sequence, with several tones seen at each step."""
    probs = torch.sigmoid(noise(STATES, x.shape[2], seed=3))
    plate = pyro.plate("tones", x.shape[2], dim=-1)
    with pyro.plate("sequences", len(x), dim=-2):
        z: Any = 0
        for t in pyro.markov(range(x.shape[1])):
            fn = dist.Categorical(MOVE[z])
            z = pyro.sample(f"z{t}", fn, infer={"enumerate": "parallel"})
            with plate:
                pyro.sample(f"x{t}", dist.Bernoulli(probs[z.squeeze(-1)]), obs=x[:, t])


def test_a_chain_with_a_plate_inside() -> None:
    x = (noise(N, T, 2, seed=4) > 0).double()
    probs = torch.sigmoid(noise(STATES, 2, seed=3))
    paths = torch.tensor([*itertools.product(range(STATES), repeat=T)])
    each = dist.Bernoulli(probs[paths]).log_prob(x[:, None]).sum((-1, -2))
    before = torch.cat([torch.zeros(len(paths), 1, dtype=torch.long), paths], 1)
    prior = MOVE[before[:, :-1], paths].log().sum(1)
    found = bounds.elbo((tones, nothing), x).values
    torch.testing.assert_close(found, (each + prior).logsumexp(1), rtol=1e-10, atol=1e-10)


def one_sequence(x: Tensor) -> None:
    """The same without a plate: the sequence is the data set."""
    z: Any = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z{t}", dist.Categorical(MOVE[z]), infer={"enumerate": "parallel"})
        pyro.sample(f"x{t}", dist.Normal(LOCS[z], 1.0), obs=x[t])


def test_one_sequence_is_one_datum() -> None:
    x = noise(30)
    found = bounds.evidence((one_sequence, nothing), x, 2)
    torch.testing.assert_close(found.values, forward(x[None]), rtol=1e-10, atol=1e-10)


def shared_state(x: Tensor) -> None:
    """All data have one state, or all the other."""
    sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
    k = pyro.sample("k", dist.Categorical(MOVE[0]), infer={"enumerate": "parallel"})
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(LOCS[k], sigma), obs=x)


def test_data_that_share_a_state_are_one_datum() -> None:
    x = noise(N)
    joint = dist.Normal(LOCS, 1.0).log_prob(x[:, None]).sum(0) + MOVE[0].log()
    for tool in (bounds.elbo, bounds.evidence):
        found = tool((shared_state, nothing), x, 2)
        torch.testing.assert_close(found.values, joint.logsumexp(0)[None])
    check_loss(shared_state, nothing, (x,), 1)
    with pytest.raises(PairError, match=r"'k' outside of it(.|\n)*plate=False"):
        bounds.elbo(Pair(shared_state, nothing, plate="data"), x)


# Topics of words, in a plate inside the data plate


DOCS, WORDS, VOCABULARY = 4, 3, 5
TOPICS = torch.softmax(noise(2, VOCABULARY, seed=5), -1)


def documents(x: Tensor) -> None:
    beta = pyro.param("beta", TOPICS.clone(), constraint=constraints.simplex)
    with pyro.plate("documents", len(x), dim=-2):
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("words", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Categorical(theta), infer={"enumerate": "parallel"})
            pyro.sample("w", dist.Categorical(beta[z]), obs=x)


def shares(x: Tensor) -> None:
    raw = pyro.param("raw", torch.zeros(DOCS, 2))
    with pyro.plate("documents", len(x), dim=-2):
        pyro.sample("theta", dist.Dirichlet(F.softplus(raw[: len(x), None]) + 0.5))


def words() -> Tensor:
    return torch.randint(VOCABULARY, (DOCS, WORDS), generator=torch.Generator().manual_seed(0))


def test_topics_of_words_are_summed_out_word_by_word() -> None:
    """At each draw of theta the likelihood of a document is a product of sums."""
    x = words()
    pair = Pair(documents, shares)
    found = terms.compute(pair.inspect(x), x, num_particles=3)
    theta = found.sites["theta"].value
    assert theta is not None
    theta = theta.reshape(3, DOCS, 2)
    expected = torch.einsum("kdt,tdw->kdw", theta, TOPICS[:, x]).log().sum(-1)
    torch.testing.assert_close(found.log_likelihood, expected, rtol=1e-10, atol=1e-10)
    check_loss(documents, shares, (x,), 2)


def test_the_evidence_of_documents_by_quadrature() -> None:
    x, share = words(), (torch.arange(4000) + 0.5) / 4000
    theta = torch.stack([share, 1 - share], -1)
    expected = (theta @ TOPICS).log()[:, x].sum(-1).logsumexp(0) - math.log(4000)
    found = bounds.evidence((documents, shares), x, 4000, progress=False)
    assert abs(found.total - float(expected.sum())) < 0.05


def test_topics_are_trained_as_by_pyro() -> None:
    check_fit(documents, shares, (words(),), is_exact=False)


def some_words(x: Tensor) -> None:
    """Two of the three words of each document are looked at."""
    theta = pyro.param("theta", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    with (
        pyro.plate("documents", len(x), dim=-2),
        pyro.plate("words", WORDS, subsample=torch.tensor([0, 2]), dim=-1),
    ):
        z = pyro.sample("z", dist.Categorical(theta), infer={"enumerate": "parallel"})
        pyro.sample("w", dist.Categorical(TOPICS[z]), obs=x[:, [0, 2]])


def test_a_subsample_of_words_is_scaled_up() -> None:
    x = words()
    expected = 1.5 * (torch.tensor([0.4, 0.6]) @ TOPICS).log()[x[:, [0, 2]]].sum(1)
    found = bounds.elbo((some_words, nothing), x).values
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    check_loss(some_words, nothing, (x,), 2)


def crossed(x: Tensor) -> None:
    rows = pyro.plate("rows", len(x), dim=-2)
    columns = pyro.plate("columns", x.shape[1], dim=-1)
    half = torch.tensor([0.5, 0.5])
    with rows:
        a = pyro.sample("a", dist.Categorical(half), infer={"enumerate": "parallel"})
    with columns:
        b = pyro.sample("b", dist.Categorical(half), infer={"enumerate": "parallel"})
    with rows, columns:
        pyro.sample("x", dist.Normal((a + b).double(), 1.0), obs=x)


def test_states_in_crossed_plates_are_refused_by_site() -> None:
    """Pyro can't eliminate them either."""
    with pytest.raises(PairError, match=r"states at .*'a'.*expected states in nested plates"):
        bounds.elbo((crossed, nothing), noise(3, 2))


# Capture and recapture: alive or not along time, between detections that are seen


def animals(seen: Tensor) -> None:
    survival = pyro.sample("survival", dist.Beta(torch.tensor(2.0), 2.0))
    detection = pyro.sample("detection", dist.Beta(torch.tensor(2.0), 2.0))
    with pyro.plate("animals", len(seen)):
        alive = torch.ones(len(seen))
        for t in pyro.markov(range(1, seen.shape[1])):
            fn = dist.Bernoulli(survival * alive)
            alive = pyro.sample(f"alive{t}", fn, infer={"enumerate": "parallel"})
            pyro.sample(f"seen{t}", dist.Bernoulli(detection * alive), obs=seen[:, t])


def histories(seen: Tensor, survival: float, detection: float) -> Tensor:
    """log p of each history by all times of death."""
    total = torch.zeros(len(seen))
    for i, history in enumerate(seen):
        last = len(history) - 1
        each = []
        for death in range(1, last + 2):  # the first year in which it is dead
            p = survival ** (death - 1) * (1 - survival if death <= last else 1.0)
            for t in range(1, last + 1):
                rate = detection if t < death else 0.0
                p *= rate if history[t] else 1 - rate
            each.append(p)
        total[i] = math.log(sum(each))
    return total


def test_capture_and_recapture_by_all_times_of_death() -> None:
    seen = torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    guide = AutoNormal(poutine.block(animals, expose=["survival", "detection"]))
    pair = Pair(animals, guide)
    found = terms.compute(pair.inspect(seen), seen)
    values = [found.sites[name].value for name in ("survival", "detection")]
    expected = histories(seen, *[float(v.detach()) for v in values if v is not None])
    torch.testing.assert_close(found.log_likelihood[0], expected, rtol=1e-9, atol=1e-9)
    check_loss(animals, guide, (seen,), 1)


# Parts that share no state stay apart


def two_mixtures(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(MOVE[0]), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(LOCS[a], 1.0), obs=x)
        b = pyro.sample("b", dist.Categorical(MOVE[1]), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(LOCS[b], 2.0), obs=y)


def test_sites_that_share_no_state_are_apart() -> None:
    x, y = noise(N), noise(N, seed=1)
    pair = Pair(two_mixtures, nothing)
    found = terms.compute(pair.inspect((x, y)), (x, y)).sites
    of_x = (dist.Normal(LOCS, 1.0).log_prob(x[:, None]) + MOVE[0].log()).logsumexp(-1)
    of_y = (dist.Normal(LOCS, 2.0).log_prob(y[:, None]) + MOVE[1].log()).logsumexp(-1)
    torch.testing.assert_close(found["a+x"].log_p, of_x[None])
    torch.testing.assert_close(found["b+y"].log_p, of_y[None])


def mixture(x: Tensor) -> None:
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        fn = dist.Categorical(torch.tensor([0.4, 0.6]))
        k = pyro.sample("k", fn, infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(Vindex(locs)[..., k], 1.0), obs=x)


def written_out(x: Tensor) -> None:
    """The same with the sum in the density."""
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        weights = dist.Categorical(torch.tensor([0.4, 0.6]))
        fn = dist.MixtureSameFamily(weights, dist.Normal(locs, 1.0))
        pyro.sample("x", fn, obs=x)


def of_locs(x: Tensor) -> None:
    pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 0.3).to_event(1))


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # a guide that is too wide
def test_loo_of_a_mixture_is_that_of_the_sum_written_out() -> None:
    x = torch.cat([noise(15) - 2, noise(15, seed=1) + 2])
    found = [
        export.loo((model, of_locs), x, num_particles=100, progress=False)
        for model in (mixture, written_out)
    ]
    assert found[0].elpd == pytest.approx(found[1].elpd, rel=1e-9)
    assert found[0].n_data_points == 30


def test_loo_needs_a_latent_to_draw() -> None:
    with pytest.raises(UndefinedError, match=r"loo: expected latents .*; got none"):
        export.loo((chain, nothing), noise(N, T), progress=False)


def test_a_discrete_latent_has_no_coordinates_until_it_is_summed_out() -> None:
    x = noise(N)
    how: dict[str, Any] = {"method": "ais", "ais": bounds.AIS(num_temperatures=50)}
    with pytest.raises(UndefinedError, match=r"'k'(.|\n)*'parallel'} at it in the model"):
        bounds.evidence((classes, listed), x, 2, progress=False, **how)

    def unlisted(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.6))

    pair = config_enumerate(classes), unlisted
    marginal = dist.Normal(LOCS, 1.25**0.5).log_prob(x[:, None]) + MOVE[0].log()
    found = bounds.evidence(pair, x, 16, progress=False, **how).values
    torch.testing.assert_close(found, marginal.logsumexp(-1), rtol=0.0, atol=0.1)


def test_a_penalty_on_states_that_are_summed_out_is_refused() -> None:
    """Inside the sum it would count as a density."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(MOVE[0]), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(LOCS[k], 1.0), obs=x)
            pyro.sample(
                "cost", dist.Unit(-0.1 * k.double()), obs=x.new_empty(N, 0), infer={PENALTY: True}
            )

    with pytest.raises(PairError, match="penalty 'cost': expected a penalty apart from states"):
        bounds.elbo((model, nothing), noise(N))


# States that the guide lists


def classes(x: Tensor) -> None:
    locs = pyro.param("locs", LOCS.clone())
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(MOVE[0]))
        z = pyro.sample("z", dist.Normal(locs[k], 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@config_enumerate
def listed(x: Tensor) -> None:
    """q(k | x) q(z | k, x)."""
    logits, gain = pyro.param("logits", torch.zeros(3)), pyro.param("gain", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(logits=logits * x[:, None]))
        pyro.sample("z", dist.Normal(gain * x + 0.1 * k, 0.6))


def test_a_guide_that_lists_its_states_is_averaged_over_as_by_pyro() -> None:
    check_loss(classes, listed, (noise(N),), 1)
    check_fit(classes, listed, (noise(N),), is_exact=False)


@pytest.mark.filterwarnings("ignore:k\nIf you want to enumerate")
def test_trace_elbo_draws_the_states_as_pyro_does() -> None:
    x = noise(N)
    check_loss(classes, listed, (x,), 1, pyro.infer.Trace_ELBO())
    losses = []
    for kind in (SVI, pvae.SVI):
        pyro.clear_param_store()
        torch.manual_seed(1)
        svi = kind(classes, listed, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        losses.append([svi.step(x) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_the_evidence_sums_the_guides_states_out() -> None:
    """Where nothing else is drawn it is log p(x) itself, whatever the guide."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(MOVE[0]))
            pyro.sample("x", dist.Normal(LOCS[k], 1.0), obs=x)

    @config_enumerate
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.tensor([0.8, 0.1, 0.1])))

    x = noise(N)
    joint = dist.Normal(LOCS, 1.0).log_prob(x[:, None]) + MOVE[0].log()
    for k in (1, 3):
        found = bounds.evidence((model, guide), x, k, progress=False).values
        torch.testing.assert_close(found, joint.logsumexp(-1), rtol=1e-10, atol=1e-10)
    q = torch.tensor([0.8, 0.1, 0.1])
    bound = bounds.elbo((model, guide), x, 2)
    torch.testing.assert_close(bound.values, (q * (joint - q.log())).sum(-1))
    assert bound.rate is not None
    torch.testing.assert_close(bound.rate.values, (q * (q / MOVE[0]).log()).sum().expand(N))


def test_the_evidence_with_states_and_draws() -> None:
    """q(z | k, x) is the posterior, so that one draw of each state is enough."""

    @config_enumerate
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.4, 0.1])))
            pyro.sample("z", dist.Normal((LOCS[k] + 4 * x) / 5, 5**-0.5))

    x = noise(N)
    marginal = dist.Normal(LOCS, 1.25**0.5).log_prob(x[:, None]) + MOVE[0].log()
    for k in (1, 3):
        found = bounds.evidence((classes, guide), x, k, progress=False).values
        torch.testing.assert_close(found, marginal.logsumexp(-1), rtol=1e-10, atol=1e-10)


@config_enumerate
def chain_of_guide(x: Tensor) -> None:
    rates = pyro.param("rates", MOVE.clone(), constraint=constraints.simplex)
    with pyro.plate("data", len(x)):
        z: Any = 1
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z{t}", dist.Categorical(rates[z]))


def test_a_chain_in_the_guide_is_averaged_over() -> None:
    x = noise(N, T)
    check_loss(chain, chain_of_guide, (x,), 1)
    found = bounds.evidence((chain, chain_of_guide), x, 1).values
    torch.testing.assert_close(found, forward(x), rtol=1e-10, atol=1e-10)


def test_states_of_model_and_guide_together() -> None:
    """The guide lists k, and the model sums c out, which depends on k."""

    def model(x: Tensor) -> None:
        locs = pyro.param("locs", LOCS.clone())
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(MOVE[0]))
            c = pyro.sample("c", dist.Categorical(MOVE[k]), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[c] + k, 1.0), obs=x)

    @config_enumerate
    def guide(x: Tensor) -> None:
        probs = pyro.param("probs", MOVE[2].clone(), constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(probs))

    x = noise(N)
    check_loss(model, guide, (x,), 1)
    k, c = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    joint = dist.Normal(LOCS[c] + k, 1.0).log_prob(x[:, None]) + (MOVE[0, k] * MOVE[k, c]).log()
    found = bounds.evidence((model, guide), x, 1).values
    torch.testing.assert_close(found, joint.logsumexp(-1), rtol=1e-10, atol=1e-10)


def test_a_guide_that_lists_some_discrete_sites_alone_is_refused_by_our_elbo() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.5)))
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("b", dist.Bernoulli(p))

    x = noise(N)
    with pytest.raises(PairError, match=r"'b' without one(.|\n)*TraceEnum_ELBO"):
        fit((model, guide), x, epochs=1, progress=False)
    fit((model, guide), x, TraceEnum_ELBO(), epochs=1, progress=False)
    fit((model, guide), x, objectives.ELBO(states="drawn"), epochs=1, progress=False)
