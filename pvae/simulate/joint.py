"""Latents and data drawn together from a model, to be put to its guide."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.errors import UndefinedError, check_int, oxford
from pvae.modes import evaluating
from pvae.options import progress_bar
from pvae.pair import Structure, mask_of
from pvae.simulate.ancestral import Simulation, simulate_batch
from pvae.terms import Evaluation, draw_guide, only_site, stream

__all__ = [
    "JointDraws",
    "draw_jointly",
    "flat_values",
    "names_of_dimensions",
    "random_rank",
    "require_rows",
]


@dataclass(frozen=True)
class JointDraws:
    """S draws of (z, x) from a model, each on the context of one row of the data."""

    latents: Tensor  # flattened and side by side, shape (S, D)
    names: tuple[str, ...]  # of their columns
    sites: tuple[str, ...]  # of the latents
    observed: Tensor  # flattened simulated data, shape (S, E)
    evaluation: Evaluation  # the pair, and the batches in which these are the data

    def of_guide(self, num_particles: int) -> Iterator[tuple[slice, Tensor]]:
        """K draws of the guide for each simulated datum: rows, and some of them, (k, n, D)."""

        def run(structure: Structure, batch: tuple[Tensor, ...], **options: Any) -> Tensor:
            sites = draw_guide(structure, batch, **options)
            each = torch.cat([_flat(sites[name].value, 2) for name in self.sites], 2)
            return each.movedim(1, 2)

        total, shown = len(self.latents) * num_particles, self.evaluation.progress
        with progress_bar(total=total, title="ranks", unit="draw", shown=shown) as bar:
            for rows, draws in stream(self.evaluation, num_particles, run=run):
                if not bool(draws.isfinite().all()):
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
    parts: list[tuple[Tensor, ...]] = []
    with evaluating(structure.modules):
        for rows in chosen.split(evaluation.max_rows):
            run = simulate_batch(structure, source.rows(rows), where=where)
            filled = run.put_back(arguments or {})
            if not parts:
                run.check_unfed(filled)
                names = names_of_dimensions(run, sites)
            data = flat_values(run, structure.observed).to(structure.dtype)
            parts.append((flat_values(run, sites), data, *filled))
    latents, observed, *whole = (torch.cat(part) for part in zip(*parts, strict=True))
    return JointDraws(latents, names, sites, observed, evaluation.on(tuple(whole)))


def require_rows(where: str, structure: Structure) -> None:
    """Refuses pairs with improper priors, or whose data and latents aren't drawn row by row."""
    structure.require_proper(where)
    outside = structure.global_sites
    if outside or not structure.latents:
        raise UndefinedError(
            where,
            "a pair whose sites are all inside the data plate, with a guide for their latents",
            f"global site(s) {oxford(outside)}" if outside else "no latent with a guide",
            ["the pair with its global latents fixed, such as by pyro.condition in both"],
        )
    if structure.subsample_size is not None or structure.tied_to is not None:
        raise UndefinedError(
            where,
            "a pair that runs on any rows it is given",
            "one that subsamples its data, or runs on one number of rows alone",
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
    return value.reshape(*value.shape[:axes], -1).double()
