"""The evidence lower bound, and the evidence by importance sampling and by annealing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Unpack

import torch
from torch import Tensor

from pvae.bounds.annealing import AIS, annealed
from pvae.bounds.joint import JointWeights, joint_weights, num_draws
from pvae.bounds.local import FAMILIES, Family, LocalFit, fit_locally
from pvae.bounds.modes import missed_by_fits, said
from pvae.bounds.possible import Possible
from pvae.bounds.sums import Sums
from pvae.bounds.weights import Influence, WeightSums, facts, require_evidence
from pvae.devices import double
from pvae.engine import Asked, Repeated
from pvae.errors import ArgumentError, check_choice, check_int, check_number
from pvae.estimate import Estimate
from pvae.options import Options, tool
from pvae.pair import Batch, PairLike, Structure
from pvae.terms import Evaluation, Terms, compute, prepared, stream

__all__ = ["elbo", "evidence"]

_NAMES = {"elbo": "ELBO", "log_joint": "log joint", "unnormalised_elbo": "unnormalised ELBO"}


@tool
def elbo(
    pair: PairLike, data: object, num_particles: int = 1, **options: Unpack[Options]
) -> Estimate:
    r"""The evidence lower bound of each datum, split into distortion and rate.

    .. math::
        L_n = E_q[\log p(x_n | z)] - E_q[\log q(z | x_n) - \log p(z)] = -D_n - R_n

    With a point-mass guide there is no such bound; the result is then named "log joint", is
    :math:`\log p(x_n, z_n)` at the code, and has no rate. With an improper prior it is named
    "unnormalised ELBO". With sites outside the data plate it is the bound for the data set, all of
    them included, and ``num_particles`` counts draws of those.

    References:
        Fixing a Broken ELBO (Alemi et al., 2018), https://arxiv.org/abs/1711.00464

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_particles: K, draws for each datum.
        options: As in `pvae.options.Options`.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> found = elbo(vae, torch.zeros(5, 4), 10)
        >>> bool(torch.allclose(found.values, -found.distortion.values - found.rate.values))
        True
    """
    k = check_int("num_particles", num_particles)
    with prepared(pair, data, options, "elbo") as evaluation:
        structure = evaluation.structure
        name = _NAMES[structure.quantity]
        if structure.global_sites:
            return _with_globals(name, evaluation, joint_weights(evaluation, k, 1))
        sums, possible, draws = Sums(), Possible(structure), Influence(evaluation, k)
        is_split = True
        for rows, terms in stream(evaluation, k, states="averaged"):
            is_split = not terms.is_joint
            sums.add(rows, _parts(terms, is_split=is_split))
            possible.take(rows, terms)
            draws.add(rows, terms.log_weight)
    values, square, likelihood, rate = sums.all / k
    variances = (square - values.square()).clamp(min=0) / (k - 1) if k > 1 else None
    has_rate = is_split and not structure.has_points and not structure.improper
    found = Estimate(
        name,
        values,
        variances,
        num_particles=k,
        influence=draws.of_mean,
        distortion=Estimate("distortion", -likelihood, num_particles=k) if is_split else None,
        rate=Estimate("rate", rate, num_particles=k) if has_rate else None,
        **facts(structure),
    )
    return possible.mark(found)


def _parts(terms: Terms, *, is_split: bool) -> Tensor:
    """Sums over particles of log weight, its square, log likelihood and rate, ``(4, n)``."""
    log_weight = double(terms.log_weight)
    split = [terms.log_likelihood, terms.log_q - terms.log_prior] if is_split else [log_weight] * 2
    return torch.stack([double(part) for part in (log_weight, log_weight.square(), *split)]).sum(1)


def _with_globals(name: str, evaluation: Evaluation, joint: JointWeights) -> Estimate:
    """The data set's bound: each draw of what is outside the data plate is shared by all data."""
    draws, about = joint.log_weights, facts(evaluation.structure)
    count = len(draws)
    found = Estimate(name, draws, by="draw", num_data=joint.num_data, num_particles=count, **about)
    return joint.possible.mark(found)


Method = Literal["importance", "local", "ais", "cubo"]

_DRAWS: dict[str, int] = {"importance": 1000, "local": 1000, "ais": 16, "cubo": 1000}


@tool
def evidence(
    pair: PairLike,
    data: object,
    num_particles: int | None = None,
    *,
    method: Method = "importance",
    ais: AIS | None = None,
    local: LocalFit | None = None,
    family: Family = "full_rank",
    order: float = 2.0,
    num_global: int | None = None,
    engine: Asked = "auto",
    **options: Unpack[Options],
) -> Estimate:
    r"""An estimate of log p(x), the log evidence, of each datum, by one of four methods.

    Each is an average over K weights for every datum, with an effective sample size, and with a
    standard error by the delta method that is too small where one weight is nearly the whole sum.

    ``method="importance"``, weights of draws from the guide, a lower bound on average:

    .. math::
        \hat\ell_n = \log \tfrac1K \sum_{k=1}^K w_{nk}, \quad
        w_{nk} = p(x_n, z_{nk}) / q(z_{nk} | x_n), \quad z_{nk} \sim q(z | x_n)

    Its expectation is at most log p(x_n) and doesn't fall as K grows. With a guide that misses the
    posterior it can be nats too low.

    ``method="local"``, the same with fresh draws from a q that is fitted to each datum by itself,
    :math:`q^*_n = \arg\max_q E_q[\log p(x_n, z) - \log q(z)]`: closer where the guide is off.

    ``method="ais"``, the same with weights of Markov chains that are annealed from the guide, or
    the prior, to the posterior (see `AIS`): much tighter, for the cost of
    ``num_temperatures * (num_leapfrog + 1)`` gradients. `bdmc` says how tight it is on data that
    the model has simulated.

    ``method="cubo"``, the chi upper bound :math:`\tfrac1n \log E_q[w^n]` of order n. Its estimate
    of K draws is too low on average, and where weights vary by much it is even below log p(x), so
    it is no certain upper bound. Where it rises with K, the draws are too few.

    With sites g outside the data plate there is no evidence of one datum; the result is that of
    the data set, by importance sampling over S joint draws,

    .. math::
        \log \tfrac1S \sum_{s=1}^S \frac{p(g_s)}{q(g_s)}
        \prod_n \tfrac1K \sum_{k=1}^K w_{nk}(g_s), \quad g_s \sim q(g)

    a lower bound on average, too. With latents of data K local draws are nested in each of the S;
    their noise adds up over data. Without any, all draws are of g, and K has no meaning beside S.
    ``"ais"`` and ``"local"`` take the data set for one datum: chains, or q, are of g and all local
    latents together.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017),
        https://arxiv.org/abs/1611.04273
        Inference Suboptimality in Variational Autoencoders (Cremer et al., 2018),
        https://proceedings.mlr.press/v80/cremer18a.html
        Variational Inference via Chi Upper Bound Minimization (Dieng et al., 2017),
        https://arxiv.org/abs/1611.00328

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_particles: K, draws or chains for each datum; None for 1000 draws or 16 chains, and for
            20 draws within each of the S. Where there is nothing local to draw, it is S.
        method: How to estimate, as above.
        ais: Settings of the annealing; None for the defaults of `AIS`.
        local: Settings of the fit of q to each datum; None for the defaults of `LocalFit`.
        family: Family of that q: ``"own"``, the guide's; ``"full_rank"``, a Gaussian in
            unconstrained coordinates; ``"flow"``, splines that start from that Gaussian.
        order: The order n of the chi upper bound, above 1.
        num_global: S, draws of latents outside the data plate; None for 200, or 4000 where all
            latents are outside, and fewer for many data or looped particles, at least 50.
        engine: ``"eager"``; ``"compiled"``, where the pass over a chunk of data is one graph, with
            the same draws; ``"auto"``, compiled where that pays. Fits and annealing are eager.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: If a latent has an improper prior, or a point-mass guide (annealing from the
            prior needs no guide); with ``"cubo"``, if there are sites outside the data plate; with
            ``"ais"`` and ``"local"``, if a latent has no unconstrained coordinates, as discrete
            ones; with ``"local"``, if latents are masked out.

    Example:
        >>> pair, x = pvae.recipes.vae(64, 2), torch.zeros(3, 64)
        >>> found = evidence(pair, x, 8, method="ais", progress=False,
        ...     ais=pvae.bounds.AIS(num_temperatures=3))
        >>> found.name, found.values.shape
        ('evidence, AIS-3', torch.Size([3]))
    """
    check_choice("method", method, _DRAWS)
    check_choice("family", family, FAMILIES)
    _check_settings(method, ais=ais, local=local)
    k = check_int("num_particles", _DRAWS[method] if num_particles is None else num_particles)
    check_int("num_global", 1 if num_global is None else num_global)
    check_number("order", order, above=1)
    with prepared(pair, data, options, "evidence") as evaluation:
        structure = evaluation.structure
        if method in ("ais", "local"):
            whole = evaluation.as_one_datum() if structure.global_sites else evaluation
            if method == "ais":
                found = _by_annealing(whole, ais or AIS(), k)
            else:
                found = _by_local_fits(whole, local or LocalFit(), family, k)
            return _of_data_set(found, evaluation) if structure.global_sites else found
        require_evidence(structure, "evidence", by_datum=method == "cubo")
        if method == "cubo":
            name = f"chi upper bound of order {order:g}, estimate"
            weights, possible, each = _weighed(WeightSums(order), evaluation, k, engine)
            found = replace(weights.estimate(name, k, structure, each), kind="estimate")
            return possible.mark(found, is_limited=False)
        if structure.global_sites:
            return _of_joint_draws(evaluation, num_global, num_particles)
        weights, possible, each = _weighed(WeightSums(), evaluation, k, engine)
        return possible.mark(weights.estimate(f"evidence, IWAE-{k}", k, structure, each))


def _of_joint_draws(
    evaluation: Evaluation, num_global: int | None, num_particles: int | None
) -> Estimate:
    """By importance sampling; with a shared point mass there is no weight, but a log joint."""
    structure = evaluation.structure
    joint = joint_weights(evaluation, *num_draws(evaluation, num_global, num_particles))
    if structure.points:
        return _with_globals(f"log joint, {joint.name}", evaluation, joint)
    return joint.evidence(structure)


def _of_data_set(found: Estimate, evaluation: Evaluation) -> Estimate:
    """The number of the one datum that the data set is, as one of the data set."""
    sites, num_data = evaluation.structure.shared_sites, evaluation.num_rows
    return replace(
        found, by="data set", num_data=num_data, global_sites=sites, remarks=found.remarks[:-1]
    )


def _check_settings(method: str, **settings: object) -> None:
    """Refuses settings of one method that are given with another."""
    for name, given in settings.items():
        if given is not None and method != name:
            raise ArgumentError(name, f"method='{name}' with it", f"method={method!r}")


def _weighed(
    weights: WeightSums, evaluation: Evaluation, num_particles: int, engine: Asked
) -> tuple[WeightSums, Possible, Influence]:
    """Sums up the weights of draws from the guide; keeps them, where they are few."""
    structure, possible = evaluation.structure, Possible(evaluation.structure)
    each = Influence(evaluation, num_particles)

    def reduced(k: int, *batch: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        terms = compute(structure, batch, num_particles=k, states="summed", given=given)
        log_weight = double(terms.log_weight)
        kept = [log_weight] if each.is_kept else []
        return torch.cat([weights.reduce(log_weight), possible.reduce(terms), *kept])

    calls = -(-evaluation.num_rows * num_particles // evaluation.max_rows)
    repeated = Repeated(reduced, calls, structure.dtype, engine)

    def run(
        _: Structure, batch: Batch, *, given: Mapping[str, Tensor], num_particles: int
    ) -> Tensor:
        if given:  # indices of rows that the pair picks
            return reduced(num_particles, *batch, given=given)
        return repeated(num_particles, *batch)

    for rows, sums in stream(evaluation, num_particles, run=run):
        weights.add(rows, sums[:2])
        possible.add(rows, sums[2 : 2 + possible.num_sums])
        each.add(rows, sums[2 + possible.num_sums :])
    return weights, possible, each


def _by_annealing(evaluation: Evaluation, ais: AIS, num_chains: int) -> Estimate:
    require_evidence(evaluation.structure, "evidence", by_datum=False, density=False)
    weights, possible, acceptance = WeightSums(), Possible(evaluation.structure), []
    each = Influence(evaluation, num_chains)
    # each of a loader's batches would have its own pilot chains
    for chunk in annealed(evaluation.in_memory(), ais, num_chains, possible=possible):
        weights.add(chunk.rows, weights.reduce(chunk.forward))
        each.add(chunk.rows, chunk.forward)
        acceptance.append(chunk.acceptance)
    name = f"evidence, AIS-{ais.num_temperatures}"
    found = weights.estimate(name, num_chains, evaluation.structure, each)
    found = replace(found, kind="lower", acceptance=torch.cat(acceptance))
    return possible.mark(found, is_limited=possible.has_one_limit)


def _by_local_fits(
    evaluation: Evaluation, how: LocalFit, family: Family, num_particles: int
) -> Estimate:
    evaluation = evaluation.in_memory()  # a loader may shuffle, and modes are looked for again
    weights, possible = WeightSums(), Possible(evaluation.structure)
    each = Influence(evaluation, num_particles)
    wanted: tuple[Family, ...] = FAMILIES[1:] if family == "flow" else (family,)
    for fit in fit_locally(evaluation, how, num_particles, families=wanted, possible=possible):
        if fit.family == family:
            weights.add(fit.rows, weights.reduce(fit.log_weights))
            each.add(fit.rows, fit.log_weights)
    name = f"evidence, local {family.replace('_', '-')} IWAE-{num_particles}"
    found = possible.mark(weights.estimate(name, num_particles, evaluation.structure, each))
    missed = missed_by_fits(evaluation, found)
    return found if missed is None else replace(found, remarks=(*found.remarks, said(missed)))
