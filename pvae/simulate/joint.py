"""Latents and data drawn together from a model, to be put to its guide."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pvae.errors import UndefinedError, check_int, oxford
from pvae.modes import evaluating
from pvae.pair import Batch, Structure, mask_of
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
    """S draws of (z, x) from a model, each on the context of one row of the data.

    Attributes:
        latents: Flattened latents side by side, shape ``(S, D)``.
        names: Of their columns.
        sites: The latents' names.
        observed: Flattened simulated data, shape ``(S, E)``.
        evaluation: The pair, and the batches in which they are the data.
    """

    latents: Tensor
    names: tuple[str, ...]
    sites: tuple[str, ...]
    observed: Tensor
    evaluation: Evaluation

    def of_guide(self, num_particles: int) -> Iterator[tuple[slice, Tensor]]:
        """K draws of the guide for each simulated datum: rows, and some of them, (k, n, D)."""

        def run(structure: Structure, batch: tuple[Tensor, ...], **options: Any) -> Tensor:
            sites = draw_guide(structure, batch, **options)
            each = torch.cat([_flat(sites[name].value, 2) for name in self.sites], 2)
            return each.movedim(1, 2)

        passes = stream(self.evaluation, num_particles, run=run)
        total, hidden = len(self.latents) * num_particles, not self.evaluation.progress
        with tqdm(total=total, disable=hidden, unit="draw") as bar:
            for rows, draws in passes:
                if not bool(draws.isfinite().all()):
                    raise UndefinedError(
                        "ranks among draws", "finite draws of the guide", "NaN or infinity"
                    )
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

    Raises:
        UndefinedError: If a pair has no such draws, or its guide none that could be ranked; if x
            belongs to no argument, or the model reads it besides observing it.
    """
    check_int("num_simulations", num_simulations, minimum=20)
    structure, source = evaluation.structure, evaluation.in_memory().source
    structure.require_density(where)
    require_rows(where, structure)
    sites = structure.latents
    if site is not None:
        sites = (only_site(where, "latent of the data", sites, site),)
    chosen = torch.randint(source.num_rows, (num_simulations,), device=source.device)
    latents: list[Tensor] = []
    observed: list[Tensor] = []
    batches: list[Batch] = []
    with evaluating(structure.modules):
        for rows in chosen.split(evaluation.max_rows):
            run = simulate_batch(structure, source.rows(rows), where=where)
            filled = run.put_back(arguments or {})
            if not batches:
                run.check_unfed(filled)
                names = names_of_dimensions(run, sites)
            latents.append(flat_values(run, sites))
            data = flat_values(run, structure.observed)
            observed.append(data.to(structure.dtype))
            batches.append(filled)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return JointDraws(torch.cat(latents), names, sites, torch.cat(observed), evaluation.on(whole))


def require_rows(where: str, structure: Structure) -> None:
    """Refuses pairs in which a datum and its latents aren't drawn apart from the others.

    Also those whose priors can't be drawn from.
    """
    structure.require_proper(where)
    if structure.global_sites or not structure.latents:
        raise UndefinedError(
            where,
            "a pair whose sites are all inside the data plate, with a guide for their latents",
            f"global site(s) {oxford(structure.global_sites)}"
            if structure.global_sites
            else "no latent with a guide",
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

    Raises:
        UndefinedError: If a latent has a mask, as padding has it.
    """
    for name in sites:
        if name not in run.structure.observed and mask_of(run.site(name)) is not None:
            raise UndefinedError(
                f"{run.where}: site '{name}'",
                "latents without a mask",
                "a mask, under which latents belong to no datum",
                ["data without padding"],
            )
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
