"""Draws of latents and data together, for a whole data set; replicates of the data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from pyro import distributions as dist
from torch import Tensor

from pvae.distributions import base_of
from pvae.errors import UndefinedError, check_choice, check_int, oxford
from pvae.modes import evaluating
from pvae.options import progress_bar
from pvae.pair import is_inside
from pvae.simulate.ancestral import FEEDS, Origin, Simulation, require_proper, simulate_batch
from pvae.terms import Evaluation, draw_globals, first_rows, fits_particles, stream
from pvae.terms.passes import no_guide
from pvae.types import Dist

__all__ = ["CheckKind", "Replicates", "check_generative", "draws"]


def draws(
    evaluation: Evaluation,
    num_draws: int,
    origin: Origin = "posterior",
    *,
    mean: bool = False,
    score: bool = False,
) -> Iterator[tuple[slice, slice, Simulation]]:
    """S draws for all data, a block of draws after another, in evaluation mode.

    A draw of what is outside the data plate is one for all data, in whatever chunks these come.
    A block has as many draws as fit the evaluation's ``max_rows``, and at least one; its chunks of
    rows follow one another, to the last row. A loader's data have to be in memory. Entries of data
    that are masked out are drawn, too: they are imputed. The options are those of
    `simulate_batch`; what comes is which draws and rows a chunk has, and these draws.
    """
    check_int("num_draws", num_draws)
    run = partial(simulate_batch, origin=origin, mean=mean, score=score, keep_masked=False)
    at_once = max(1, min(num_draws, evaluation.max_rows // evaluation.num_rows))
    if at_once > 1:  # the first rows say whether particles can be vectorised
        fits_particles(evaluation)
    done = 0
    while done < num_draws:
        k = min(at_once, num_draws - done)
        given: dict[str, Tensor] = {}
        if evaluation.structure.global_sites:
            given, k = _draw_globals(evaluation, k, origin)
        for rows, simulation in stream(evaluation, k, given, run=run):
            yield slice(done, done + k), rows, simulation
        done += k


def _draw_globals(
    evaluation: Evaluation, num_draws: int, origin: Origin
) -> tuple[dict[str, Tensor], int]:
    """Draws of what is outside the data plate, and how many there are; see `draw_globals`."""
    is_prior = origin == "prior"
    if is_prior:
        require_proper(evaluation.structure)
        structure = replace(evaluation.structure, guide=no_guide, enumerated=())
        evaluation = replace(evaluation, structure=structure)
    drawn = draw_globals(evaluation, num_draws, of_model=is_prior)
    return drawn.given, drawn.count


def check_generative(
    what: str, evaluation: Evaluation, origin: Origin = "posterior", *, latents_alone: bool = False
) -> None:
    """Refuses a pair whose sites can't be drawn by drawing each from its distribution.

    That is so where there are factors, which no draw of the model follows; where an enumerated
    latent of the data, which the guide doesn't have, would have to come from its posterior; and,
    unless it is latents alone that are drawn, where an observed site's distribution is fed the
    data that it scores, but for those before them, as with teacher forcing.
    """
    structure = evaluation.structure
    if structure.enumerated and origin == "posterior":
        raise UndefinedError(
            what,
            "a guide for all latents, as draws of data from q(z | x) need",
            f"{oxford(structure.enumerated)}, which the model sums out",
            ["kind='mixed' or 'prior', in which the model draws them", "a guide for them"],
        )
    given, _ = _draw_globals(evaluation, 1, origin) if structure.global_sites else ({}, 1)
    with evaluating(structure.modules):
        batch = first_rows(evaluation)
        first = simulate_batch(structure, batch, origin=origin, given=given, where=what)
        if not first.traces or latents_alone:
            return
        if FEEDS in structure.notes:
            return
        try:
            first.put_back()
        except UndefinedError:  # what is no entry of the batch isn't fed to the model either
            return
        if first.settled().is_fed:
            structure.notes[FEEDS] = True


CheckKind = Literal["mixed", "prior", "posterior", "aggregated"]
"""What a replicate is: see `pvae.diagnostics.predictive`."""


@dataclass(frozen=True)
class Replicates:
    """A pair and data, ready to be replicated at one observed site."""

    evaluation: Evaluation
    site: str
    kind: CheckKind
    observed: Tensor  # the data at that site, shape (N, *event_shape)
    mask: Tensor | None  # which entries count, of the same shape; None if all do
    fn: Dist  # the site's distribution

    @classmethod
    def of(
        cls, where: str, evaluation: Evaluation, site: str | None, kind: CheckKind
    ) -> Replicates:
        """Looks at pair and data together, and refuses what has no replicates."""
        check_choice("kind", kind, get_args(CheckKind))
        evaluation = evaluation.in_memory()
        if kind == "aggregated" and not evaluation.structure.latents:
            expected = "latents of data, whose guides are averaged under kind='aggregated'"
            raise UndefinedError(where, expected, "none", ["kind='mixed'"])
        check_generative(where, evaluation, _origin(kind))
        data, masks = [], []
        for _, _, run in draws(evaluation, 1, _origin(kind)):
            name = _observed_site(where, run, site)
            data.append(run.data(name))
            masks.append(run.mask(name))
        fn = run.site(name)["fn"]
        mask = None if masks[0] is None else torch.cat([m for m in masks if m is not None])
        if mask is not None and kind == "aggregated":
            expected = "data without a mask, as rows change places under kind='aggregated'"
            fixes = ["kind='mixed'", "kind='posterior'"]
            raise UndefinedError(where, expected, f"a mask at site '{name}'", fixes)
        return cls(evaluation, name, kind, torch.cat(data), mask, fn)

    def blocks(self, num_particles: int) -> Iterator[Tensor]:
        """Replicated data sets, shape ``(k, N, *event_shape)``, k of them at a time.

        Where data are masked out there is nothing to be compared: entries are those of the data.
        """
        num_rows = len(self.observed)
        parts: list[Tensor] = []
        passes = draws(self.evaluation, num_particles, _origin(self.kind))
        shown = self.evaluation.progress
        with progress_bar(total=num_particles, title="replicates", unit="draw", shown=shown) as bar:
            for chosen, rows, run in passes:
                parts.append(run.value(self.site))
                if rows.stop < num_rows:
                    continue
                block = torch.cat(parts, 1)
                if self.kind == "aggregated":
                    others = torch.randint(num_rows, block.shape[:2], device=block.device)
                    block = block[torch.arange(len(block), device=block.device)[:, None], others]
                seen = self.mask
                yield block if seen is None else torch.where(seen, block, self.observed)
                parts = []
                bar.update(chosen.stop - chosen.start)

    @property
    def has_honest_p_values(self) -> bool:
        """Whether a replicate owes nothing to the very datum that it is compared with."""
        return self.kind != "posterior" or not self.evaluation.structure.latents

    def labels(self) -> Callable[[Tensor], Tensor] | None:
        """From data to class numbers, where the data are classes; None where they aren't."""
        fn = base_of(self.fn)
        if isinstance(fn, dist.OneHotCategorical):
            return lambda x: x.argmax(-1)
        return (lambda x: x) if type(fn) is dist.Categorical else None

    def require_order(self, where: str) -> None:
        """Refuses values that aren't ordered: classes and angles."""
        fn = base_of(self.fn)
        classes = (dist.Categorical, dist.OneHotCategorical)
        angles = (dist.VonMises, dist.VonMises3D, dist.ProjectedNormal)
        if isinstance(fn, (*classes, *angles)):
            raise UndefinedError(
                where,
                f"ordered values at site '{self.site}'",
                f"{type(fn).__name__}, whose values have no order",
                [
                    "statistic=lambda x: x.double(), if the classes are ordered",
                    "diagnostics.predictive, with statistics of your own",
                ],
            )


def _origin(kind: CheckKind) -> Origin:
    return "posterior" if kind == "aggregated" else kind


def _observed_site(where: str, run: Simulation, site: str | None) -> str:
    """The site that was asked for, or the only one of the data."""
    structure = run.structure
    local = [name for name in structure.observed if is_inside(structure, run.site(name))]
    if site in local or (site is None and len(local) == 1):
        return site or local[0]
    expected = "site=NAME, an observed site inside the data plate"
    actual = f"{site!r}; there are: {oxford(local) if local else 'none'}"
    raise UndefinedError(where, expected, actual, [f"site='{name}'" for name in local[:2]])
