"""Draws of latents and data together, for a whole data set, and what observed sites would draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor

from pvae.data import first_batch
from pvae.errors import ArgumentError, UndefinedError, check_int, oxford
from pvae.internals import mask_of
from pvae.modes import evaluating
from pvae.pair import Batch, Structure
from pvae.terms.chunks import stream
from pvae.terms.collect import PARTICLES
from pvae.terms.evaluation import Evaluation
from pvae.terms.passes import compute
from pvae.terms.result import Terms

__all__ = [
    "Kind",
    "check_generative",
    "draw_globals",
    "draws",
    "is_inside",
    "kept_of",
    "observed",
    "replicate",
]

Kind = Literal["posterior", "prior", "mixed"]
"""Where latents come from: the guide; the model; global ones from the guide, those of data from
the model given these."""


def draws(
    evaluation: Evaluation,
    num_draws: int,
    kind: Kind = "posterior",
) -> Iterator[tuple[slice, slice, Terms]]:
    """Terms of S draws for all data, a block of draws after another, in evaluation mode.

    A draw of what is outside the data plate is one for all data, in whatever chunks these come.
    A block has as many draws as fit the evaluation's ``max_rows``, and at least one; its chunks of
    rows follow one another, to the last row.

    Arguments:
        evaluation: The pair and its data, these in `pvae.data.in_memory` if they are a loader's.
        num_draws: S.
        kind: Where latents come from. What the model draws has no log q.

    Yields:
        The draws and the rows that a chunk has, and its terms.

    Raises:
        UndefinedError: If the model is to draw a latent that has an improper prior.
    """
    check_int("num_draws", num_draws)
    structure = evaluation.structure
    outer = inner = evaluation
    if kind != "posterior":  # enumerated latents are drawn like others
        outer = replace(evaluation, structure=replace(structure, enumerated=()))
        inner = replace(evaluation, structure=replace(outer.structure, guide=_nothing))
    if kind == "prior":
        outer = inner
    by_model = {
        "posterior": (),
        "mixed": (*structure.latents, *structure.enumerated),
        "prior": (*structure.latents, *structure.enumerated, *structure.global_latents),
    }
    if kind not in by_model:
        raise ArgumentError("kind", f"one of {', '.join(by_model)}", repr(kind))
    drawn = [name for name in structure.improper if name in by_model[kind]]
    if drawn:
        raise UndefinedError(
            f"draws of {oxford(drawn)} from the model",
            "a prior that is a distribution",
            "an improper one",
            [
                "a proper prior, such as priors.StandardNormal",
                "kind='aggregated' or 'posterior', in a predictive check",
            ],
        )
    at_once = max(1, min(num_draws, evaluation.max_rows // evaluation.num_rows))
    if at_once > 1:  # the pair itself says whether particles can be vectorised
        _first_terms(evaluation, 2)
    done = 0
    while done < num_draws:
        k = min(at_once, num_draws - done)
        given: dict[str, Tensor] = {}
        if structure.global_sites:
            given, first = draw_globals(outer, k)
            k = first.num_particles
        for rows, terms in stream(inner, k, given):
            yield slice(done, done + k), rows, terms
        done += k


def _nothing(*batch: object) -> None:
    """A guide that leaves all latents to the model."""


def _first_terms(evaluation: Evaluation, num_particles: int) -> Terms:
    structure, source = evaluation.structure, evaluation.source
    rows = source.num_rows if structure.subsample_size else structure.tied_to or 128
    with evaluating(structure.modules):
        batch = first_batch(source, rows)
        return compute(structure, batch, num_particles=num_particles)


def draw_globals(evaluation: Evaluation, num_draws: int = 1) -> tuple[dict[str, Tensor], Terms]:
    """Draws of what is outside the data plate, in the form in which they can be given.

    Those of several particles can be given only to as many vectorised ones, so where particles
    are looped it is one; the terms, which are of the first rows, say how many.
    """
    terms = _first_terms(evaluation, num_draws).passes[0]
    k, given = terms.num_particles, dict[str, Tensor]()
    for name, site in terms.sites.items():
        if site.is_local or site.kind not in ("latent", "auxiliary") or site.draws is None:
            continue
        event_dim = len((site.guide or site.model).event_shape)
        padding = terms.structure.nesting + event_dim + 1 - site.draws.dim()
        shape = (k, *(1,) * padding, *site.draws.shape[1:])
        given[name] = site.draws.reshape(shape) if k > 1 else site.draws[0]
    return given, terms


def replicate(terms: Terms, name: str, *, mean: bool = False) -> Tensor:
    """Data as the model draws them at an observed site, given the latents of a pass.

    Where data are masked out they are the observed ones.

    Arguments:
        terms: The pass.
        name: The observed site.
        mean: The means of the distributions in place of draws.

    Returns:
        Shape ``(K, N, ...)`` inside the data plate and ``(K, ...)`` outside.

    Raises:
        UndefinedError: If the distribution can't draw, or has no mean.
    """
    parts = []
    for one in terms.passes:
        node = one.model_trace.nodes[name]
        fn = node["fn"]
        try:
            value = fn.mean if mean else fn.sample()
        except (NotImplementedError, AttributeError):
            raise UndefinedError(
                f"site '{name}'",
                "a distribution that has a mean" if mean else "a distribution that can draw",
                type(fn).__name__,
                ["mean=False"] if mean else [".sample() on the distribution"],
            ) from None
        keep = _mask_of(node)
        if keep is not None:
            value = torch.where(keep, value, node["value"].to(value.dtype))
        parts.append(_laid_out(value, one, name, terms.num_rows))
    return torch.cat(parts)


def observed(terms: Terms, name: str) -> Tensor:
    """The data at an observed site, shape ``(N, ...)`` inside the data plate."""
    one = terms.passes[0]
    node = one.model_trace.nodes[name]
    value: Tensor = node["value"]
    if not is_inside(one.structure, node):
        return value
    axis = value.dim() - len(node["fn"].event_shape) + one.structure.dim
    return value.movedim(axis, 0)[: terms.num_rows]


def is_inside(structure: Structure, node: Any) -> bool:
    """Whether a site of a trace is inside the data plate."""
    return any(frame.name in structure.plates for frame in node["cond_indep_stack"])


def kept_of(terms: Terms, name: str) -> Tensor | None:
    """Which entries of an observed site aren't masked out, shape ``(N, ...)``; None if all are."""
    one = terms.passes[0]
    node = one.model_trace.nodes[name]
    mask = _mask_of(node)
    if mask is None:
        return None
    full = mask.expand(node["fn"].batch_shape + node["fn"].event_shape)
    return _laid_out(full, one, name, terms.num_rows)[0]


def _laid_out(value: Tensor, one: Terms, name: str, num_rows: int) -> Tensor:
    """A draw of a site's distribution, particles first and then data."""
    node = one.model_trace.nodes[name]
    fn = node["fn"]
    frames = [f for f in node["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
    own = max((-f.dim for f in frames), default=0)
    plates = fn.batch_shape[len(fn.batch_shape) - own :]
    value = value.reshape(one.num_particles, *plates, *fn.event_shape)
    if not is_inside(one.structure, node):
        return value
    return value.movedim(1 + own + one.structure.dim, 1)[:, :num_rows]


def _mask_of(node: Any) -> Tensor | None:
    """What `poutine.mask` and ``.mask(...)`` leave of a site, over its batch and event shape."""
    fn, keep = node["fn"], None
    rank = len(fn.batch_shape) + len(fn.event_shape)
    masks = [(node["mask"], len(fn.event_shape))]
    while isinstance(fn, (torch.distributions.Independent, MaskedDistribution)):
        if isinstance(fn, MaskedDistribution):
            masks.append((mask_of(fn), len(fn.event_shape)))
        fn = fn.base_dist
    for mask, event_dim in masks:
        if mask is None or mask is True:
            continue
        part = torch.as_tensor(mask, device=node["value"].device).bool()
        part = part.reshape(part.shape + (1,) * event_dim)
        part = part.reshape((1,) * (rank - part.dim()) + part.shape)
        keep = part if keep is None else keep & part
    return keep


def check_generative(
    what: str,
    evaluation: Evaluation,
    kind: Kind = "posterior",
    *,
    latents_alone: bool = False,
) -> None:
    """Refuses a pair whose sites can't be drawn by drawing each from its distribution.

    That is so where there are factors, which no draw of the model follows; where an enumerated
    latent of the data, which the guide doesn't have, would have to come from its posterior; and
    where an observed site's distribution is fed the data that it scores, as with teacher forcing.
    The last is found by another order of the data, the latents as they were.

    Arguments:
        what: What is refused.
        evaluation: The pair and its data.
        kind: Where latents come from.
        latents_alone: Whether no data are to be drawn.

    Raises:
        UndefinedError: Naming the site.
    """
    structure, source = evaluation.structure, evaluation.source
    if structure.enumerated and kind == "posterior":
        raise UndefinedError(
            what,
            "a guide for all latents, as draws of data from q(z | x) need",
            f"{oxford(structure.enumerated)}, which the model sums out",
            ["kind='mixed' or 'prior', in which the model draws them", "a guide for them"],
        )
    structure = replace(structure, enumerated=())
    rows = source.num_rows if structure.subsample_size else structure.tied_to or 128
    with evaluating(structure.modules):
        batch = first_batch(source, rows)
        terms = compute(structure, batch)
        factors = [name for name, site in terms.sites.items() if site.kind == "factor"]
        if factors:
            raise UndefinedError(
                what,
                "a model without factors, which no draw follows",
                f"factor {oxford(factors)}",
                ["pyro.infer.NUTS on the model"],
            )
        if not latents_alone:
            _check_unfed(what, batch, terms)


def _check_unfed(what: str, batch: Batch, terms: Terms) -> None:
    nodes, names = terms.model_trace.nodes, terms.structure.observed
    values = [nodes[name]["value"] for name in names]
    turned = tuple(b.flip(0) if any(_is_same(b, v) for v in values) else b for b in batch)
    given = {
        name: node["value"]
        for trace in (terms.guide_trace, terms.model_trace)
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
    }
    again = compute(terms.structure, turned, given=given)
    for name, value in zip(names, values, strict=True):
        other = again.model_trace.nodes[name]["fn"]
        if not torch.allclose(nodes[name]["fn"].log_prob(value), other.log_prob(value)):
            raise UndefinedError(
                what,
                f"a distribution at site '{name}' that depends on latents and covariates alone",
                "one that changes with the data that it scores, as under teacher forcing",
                ["a sampler of your own, whose draws go to your own statistics"],
            )


def _is_same(part: Tensor, value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and part.dim() > 0
        and part.shape == value.shape
        and bool((part == value).all())
    )
