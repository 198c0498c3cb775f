"""Latents and data drawn together from a model, to be put to its guide."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pvae.data import joined
from pvae.devices import double
from pvae.errors import PvaeError, UndefinedError, check_int, oxford
from pvae.modes import evaluating
from pvae.options import progress_bar
from pvae.pair import Batch, Structure, mask_of
from pvae.simulate.ancestral import Simulation, simulate_batch
from pvae.terms import Evaluation, Terms, compute, draw_guide, only_site, stream
from pvae.terms.passes import no_guide

__all__ = [
    "JointDraws",
    "Score",
    "draw_jointly",
    "flat_values",
    "names_of_dimensions",
    "random_rank",
    "require_rows",
]


@dataclass(frozen=True)
class Score:
    """One number of (z, x), by which draws of the posterior and of q can be told apart.

    It is log p(x, z) - log q(z | x), which is constant if q is exact; or log p(x, z) where log q of
    a given z isn't known. Numbers are rounded, so that what differs by rounding alone is equal.
    """

    is_weight: bool
    step: float

    @property
    def name(self) -> str:
        """What it is, in symbols."""
        return "log p(x, z) - log q(z | x)" if self.is_weight else "log p(x, z)"

    def of(self, terms: Terms) -> Tensor:
        """Of the latents of a pass, ``(K, N)``."""
        value = terms.log_weight if self.is_weight else terms.log_joint
        return (double(value) / self.step).round().nan_to_num(nan=-math.inf) * self.step

    @classmethod
    def of_simulated(
        cls, structure: Structure, batch: Batch, latents: Mapping[str, Tensor], step: float | None
    ) -> tuple[Score, Tensor]:
        """The score that a pair has, and its values ``(N,)`` for the latents of simulated data."""
        is_weight, terms = not (structure.auxiliary or structure.fed), None
        if is_weight:
            try:
                terms = compute(structure, batch, given=latents)
            except (PvaeError, NotImplementedError):  # a flow that has no inverse
                is_weight = False
        if terms is None:
            terms = compute(replace(structure, guide=no_guide), batch, given=latents)
        if step is None:
            size = terms.log_joint.abs().nan_to_num(0.0, 0.0, 0.0).median()
            step = max(1e-3, 10 * torch.finfo(size.dtype).eps * float(size))
        score = cls(is_weight, step)
        return score, score.of(terms)[0]


@dataclass(frozen=True)
class JointDraws:
    """S draws of (z, x) from a model, each on the context of one row of the data."""

    latents: Tensor  # flattened and side by side, shape (S, D)
    names: tuple[str, ...]  # of their columns
    sites: tuple[str, ...]  # of the latents
    observed: Tensor  # flattened simulated data, shape (S, E)
    evaluation: Evaluation  # the pair, and the batches in which these are the data
    score: Score | None = None
    scores: Tensor | None = None  # of these (z, x), shape (S,)

    def of_guide(self, num_particles: int) -> Iterator[tuple[slice, Tensor]]:
        """K draws of the guide for each simulated datum: rows, and some of them, (k, n, D).

        Their scores are one more column, where these draws have any.
        """
        score = self.score

        def run(structure: Structure, batch: tuple[Tensor, ...], **options: Any) -> Tensor:
            if score is None:
                sites, scores = draw_guide(structure, batch, **options), []
            else:
                terms = compute(structure, batch, **options)
                sites, scores = terms.sites, [score.of(terms).unsqueeze(2)]
            each = torch.cat([*(_flat(sites[name].value, 2) for name in self.sites), *scores], 2)
            return each.movedim(1, 2)

        total, shown = len(self.latents) * num_particles, self.evaluation.progress
        with progress_bar(total=total, title="ranks", unit="draw", shown=shown) as bar:
            for rows, draws in stream(self.evaluation, num_particles, run=run):
                if not bool(draws[:, : len(self.names)].isfinite().all()):
                    expected = "finite draws of the guide"
                    raise UndefinedError("ranks among draws", expected, "NaN or infinity")
                yield rows, draws.movedim(2, 1)
                bar.update(draws.shape[0] * draws.shape[2])


def random_rank(less: Tensor, equal: Tensor) -> Tensor:
    """The number of lesser draws; among equal ones, as of discrete latents, a place by chance."""
    place = torch.rand(equal.shape, dtype=torch.float64, device=equal.device)
    return less + (place * (equal + 1)).long()


def draw_jointly(
    where: str,
    evaluation: Evaluation,
    num_simulations: int,
    *,
    site: str | None,
    arguments: Mapping[str, int] | None,
    scored: bool = False,
) -> JointDraws:
    """Draws (z, x) from a model, and puts x into the arguments that the data came from.

    Refused if a pair has no such draws, or its guide none that could be ranked; if x belongs to no
    argument, or the model reads it besides observing it.
    """
    check_int("num_simulations", num_simulations, minimum=20)
    structure, source = evaluation.structure, evaluation.in_memory().source
    structure.require_density(where)
    require_rows(where, structure)
    sites = structure.latents
    if site is not None:
        sites = (only_site(where, "latent of the data", sites, site),)
    chosen = torch.randint(source.num_rows, (num_simulations,), device=source.device)
    parts: list[tuple[Tensor, Tensor]] = []
    batches: list[Batch] = []
    scores: list[Tensor] = []
    score: Score | None = None
    with evaluating(structure.modules), torch.no_grad():
        for rows in chosen.split(evaluation.max_rows):
            run = simulate_batch(structure, source.rows(rows), where=where)
            settled = run.settled(arguments or {})
            filled, run.traces = settled.batch, [settled.trace]
            if not parts:
                names = names_of_dimensions(run, sites)
            data = flat_values(run, structure.observed).to(structure.dtype)
            parts.append((flat_values(run, sites), data))
            batches.append(filled)
            if scored:
                given = {name: run.traces[0].nodes[name]["value"] for name in structure.latents}
                step = None if score is None else score.step
                score, own = Score.of_simulated(structure, filled, given, step)
                scores.append(own)
    latents, observed = (torch.cat(part) for part in zip(*parts, strict=True))
    on = evaluation.on(joined(batches, structure.axes))
    return JointDraws(
        latents, names, sites, observed, on, score, torch.cat(scores) if scored else None
    )


_REFITS = "diagnostics.sbc(pair, x, refits=20), which fits the guide to each simulation"


def require_rows(where: str, structure: Structure) -> None:
    """Refuses pairs with improper priors, or whose data and latents aren't drawn row by row."""
    structure.require_proper(where)
    outside = structure.shared_sites
    if outside or not structure.latents:
        raise UndefinedError(
            where,
            "a pair whose sites are all inside the data plate, with a guide for their latents",
            f"global site(s) {oxford(outside)}" if outside else "no latent with a guide",
            [_REFITS] if outside else [],
        )
    if not structure.takes_any_rows:
        raise UndefinedError(
            where,
            "a pair that runs on any rows it is given",
            "one that subsamples its data, or runs on one number of rows alone"
            if structure.has_plate
            else "one whose data no plate counts: all are one datum",
            ["pyro.plate(name, len(x)), with no subsample"],
        )


def flat_values(run: Simulation, sites: Sequence[str]) -> Tensor:
    """One draw of several sites side by side, a row a datum, in double precision, ``(N, D)``.

    Latents that have a mask, as padding has it, are refused.
    """
    for name in sites:
        if name not in run.structure.observed and mask_of(run.site(name)) is not None:
            actual = "a mask, under which latents belong to no datum"
            where = f"{run.where}: site '{name}'"
            raise UndefinedError(where, "latents without a mask", actual, ["data without padding"])
    return torch.cat([_flat(run.value(name)[0], 1) for name in sites], 1)


def names_of_dimensions(run: Simulation, sites: Sequence[str]) -> tuple[str, ...]:
    """What the entries of flattened sites are called: ``z[0]``."""
    names: list[str] = []
    for name in sites:
        places = itertools.product(*map(range, run.value(name).shape[2:]))
        names += [f"{name}[{','.join(map(str, i))}]" if i else name for i in places]
    return tuple(names)


def _flat(value: Tensor | None, axes: int) -> Tensor:
    """A value with all axes but the first ones flattened."""
    assert value is not None  # noqa: S101
    return double(value.reshape(*value.shape[:axes], -1))
