"""The evidence, by importance sampling and by annealing, and the upper bound that is akin to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from pvae import terms as t
from pvae.bounds.annealing import AIS, annealed
from pvae.bounds.local import refined
from pvae.bounds.lower import kind_of, with_globals
from pvae.bounds.result import Bound
from pvae.bounds.sums import WeightSums
from pvae.engine import Asked, Repeated
from pvae.errors import ArgumentError, UndefinedError, check_int, check_number, oxford
from pvae.options import Options, tool
from pvae.pair import PairLike

__all__ = ["evidence"]

Method = Literal["importance", "local", "ais", "cubo"]

_DRAWS: dict[str, int] = {"importance": 1000, "local": 1000, "ais": 16, "cubo": 1000}


@tool
def evidence(
    pair: PairLike,
    data: Any,
    num_particles: int | None = None,
    *,
    method: Method = "importance",
    ais: AIS | None = None,
    order: float = 2.0,
    num_global: int = 16,
    engine: Asked = "auto",
    **options: Unpack[Options],
) -> Bound:
    r"""The estimate of the evidence of each datum, by one of four methods.

    All of them are averages over K weights, each with a standard error over draws by the delta
    method (where one weight has it all, even that is too small), and an effective sample size.

    ``method="importance"``, weights of draws from the guide, a lower bound on average:

    .. math::
        \hat\ell_n = \log \tfrac1K \sum_{k=1}^K w_{nk}, \quad
        w_{nk} = p(x_n, z_{nk}) / q(z_{nk} | x_n), \quad z_{nk} \sim q(z | x_n)

    Its expectation is at most log p(x_n) and doesn't fall as K grows. With a guide that misses the
    posterior it can be nats too low.

    ``method="local"``, the same with draws from a full-rank Gaussian that is fitted to each datum's
    posterior, where the guide may be off (`refined` has other families and settings).

    ``method="ais"``, the same with weights of Markov chains that are annealed from the guide, or
    the prior, to the posterior (see `AIS`): a lower bound on average, and much tighter; the cost
    is that of ``num_temperatures * (num_leapfrog + 1)`` gradients. `bdmc` says how tight it is on
    data that the model has simulated.

    ``method="cubo"``, the chi upper bound :math:`\tfrac1n \log E_q[w^n]` of order n. Its estimate
    of K draws is too low on average, and where weights vary by much it is even below log p(x): it
    is no certain upper bound, and a sign of trouble where it rises with K.

    With sites g outside the data plate there is no evidence of one datum; the result is the bound
    for the data set,
    :math:`E_{q(g)}[\log p(g) - \log q(g) + \sum_n \log \tfrac1K \sum_k w_{nk}(g)]`, by
    importance sampling.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017),
        https://arxiv.org/abs/1611.04273
        Variational Inference via Chi Upper Bound Minimization (Dieng et al., 2017),
        https://arxiv.org/abs/1611.00328

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_particles: K, draws or chains for each datum; None for 1000 draws or 16 chains.
        method: As above.
        ais: How to anneal; None for what `AIS` is by itself.
        order: n of the upper bound, above 1.
        num_global: Draws of global latents, where there are any.
        engine: ``"eager"``; ``"compiled"``, where the pass over a chunk of data is one graph, with
            the same draws; ``"auto"``, compiled where that pays. Fits and annealing are eager.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: If a latent of a datum has an improper prior, or, but for annealing from
            the prior, a point-mass guide; if a latent that is to be annealed is discrete, or
            there are sites outside the data plate.

    Example:
        >>> pair, x = pvae.recipes.vae(64, 2), torch.zeros(3, 64)
        >>> found = evidence(pair, x, 8, method="ais", progress=False,
        ...     ais=pvae.bounds.AIS(num_temperatures=3))
        >>> found.name, found.values.shape
        ('evidence, AIS-3', torch.Size([3]))
    """
    if method not in _DRAWS:
        raise ArgumentError("method", oxford(_DRAWS), repr(method))
    if ais is not None and method != "ais":
        raise ArgumentError("ais", "method='ais' with it", f"method={method!r}")
    k = _DRAWS[method] if num_particles is None else check_int("num_particles", num_particles)
    check_int("num_global", num_global)
    check_number("order", order, above=1)
    with t.prepared(pair, data, options, "evidence") as evaluation:
        structure = evaluation.structure
        if method == "ais":
            structure.require_proper("evidence")
            how = ais or AIS()
            return _by_annealing(evaluation, how, k)
        structure.require_density("evidence by importance sampling")
        structure.require_proper("evidence")
        if method == "local":
            return refined(evaluation.pair, evaluation.source, k, **options)
        if method == "cubo":
            _require_local(structure)
            weights = WeightSums(order)
            _weigh(weights, evaluation, k, engine)
            scales = structure.removed_scales
            name = f"chi upper bound of order {order:g}, estimate"
            return weights.bound(name, k, kind="estimate", removed_scales=scales)
        what = "log joint" if structure.points else "evidence"
        name = f"{what}, IWAE-{k}"
        if structure.global_sites:
            return with_globals(name, evaluation, num_global, k)
        weights = WeightSums()
        _weigh(weights, evaluation, k, engine)
        scales = structure.removed_scales
        return weights.bound(name, k, kind=kind_of(structure), removed_scales=scales)


def _weigh(
    weights: WeightSums,
    evaluation: t.Evaluation,
    num_particles: int,
    engine: Asked,
) -> None:
    """Sums up the weights of draws from the guide."""

    def reduced(k: int, *batch: Tensor) -> Tensor:
        terms = t.compute(evaluation.structure, batch, num_particles=k)
        return weights.reduce(terms.log_weight)

    calls = -(-evaluation.num_rows * num_particles // evaluation.max_rows)
    repeated = Repeated(reduced, calls, evaluation.structure.dtype, engine)

    def run(
        structure: t.Structure,
        batch: tuple[Tensor, ...],
        *,
        given: Mapping[str, Tensor],
        num_particles: int,
    ) -> Tensor:
        if not given:
            return repeated(num_particles, *batch)
        terms = t.compute(structure, batch, given=given, num_particles=num_particles)
        return weights.reduce(terms.log_weight)  # of rows that the pair picks

    chunks = t.stream(evaluation, num_particles, run=run)
    for rows, sums in chunks:
        weights.add(rows, sums)


def _by_annealing(
    evaluation: t.Evaluation,
    ais: AIS,
    num_chains: int,
) -> Bound:
    weights, acceptance = WeightSums(), []
    # each of a loader's batches would have its own pilot chains
    for chunk in annealed(evaluation.in_memory(), ais, num_chains):
        weights.add(chunk.rows, weights.reduce(chunk.forward))
        acceptance.append(chunk.acceptance)
    return weights.bound(
        f"evidence, AIS-{ais.num_temperatures}",
        num_chains,
        acceptance=torch.cat(acceptance),
        removed_scales=evaluation.structure.removed_scales,
    )


def _require_local(structure: t.Structure) -> None:
    if structure.global_sites:
        raise UndefinedError(
            "the chi upper bound of single data",
            "a pair whose sites are all inside the data plate",
            f"global site {oxford(structure.global_sites)}",
            ["method='importance', for the data set"],
        )
