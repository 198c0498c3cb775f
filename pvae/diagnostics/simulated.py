"""Pairs of latent and datum drawn from a model, put to its guide."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from tqdm import tqdm

from pvae import internals
from pvae import terms as t
from pvae.errors import PairError, UndefinedError, check_int, oxford
from pvae.latent.checks import only_site
from pvae.latent.programs import is_simulated, simulated
from pvae.modes import evaluating
from pvae.pair import probing

__all__ = [
    "Simulations",
    "column_names",
    "columns",
    "mask_of",
    "of_rows",
    "random_rank",
    "refuse_mask",
    "require_rows",
    "simulate",
]


@dataclass(frozen=True)
class Simulations:
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
    evaluation: t.Evaluation

    def draws(self, num_draws: int) -> Iterator[tuple[slice, Tensor]]:
        """The guide's draws for each simulated datum: rows, and a share of them, (k, n, D)."""

        def run(structure: t.Structure, batch: tuple[Tensor, ...], **options: Any) -> Tensor:
            sites = t.draw_guide(structure, batch, **options)
            each = torch.cat([columns(sites[name].value, 2) for name in self.sites], 2)
            return each.movedim(1, 2)

        passes = t.stream(self.evaluation, num_draws, run=run)
        total, hidden = len(self.latents) * num_draws, not self.evaluation.progress
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


def simulate(
    where: str,
    evaluation: t.Evaluation,
    num_simulations: int,
    *,
    site: str | None,
    arguments: Mapping[str, int] | None,
) -> Simulations:
    """Draws (z, x) from a model, and puts x into the arguments that the data came from.

    Raises:
        UndefinedError: If a pair has no such draws, or its guide none that could be ranked.
        PairError: If x belongs to no argument, or the model reads it besides observing it.
    """
    check_int("num_simulations", num_simulations, minimum=20)
    structure, source = evaluation.structure, evaluation.in_memory().source
    structure.require_density(where)
    require_rows(where, structure)
    sites = (
        structure.latents
        if site is None
        else (only_site(where, "latent of the data", structure.latents, site),)
    )
    chosen = torch.randint(source.num_rows, (num_simulations,), device=source.device)
    latents: list[Tensor] = []
    observed: list[Tensor] = []
    batches: list[tuple[Tensor, ...]] = []
    found: dict[str, int] = {}
    with evaluating(structure.modules):
        for rows in chosen.split(evaluation.max_rows):
            batch = source.rows(rows)
            run = simulated(where, structure.model, batch)
            if not found:
                found = _arguments(where, run, batch, arguments or {})
                names = column_names(run, sites, structure)
            values, filled = _put_back(where, run, batch, found, structure)
            _check_joint(where, batch, filled, run, structure)
            latents.append(torch.cat([of_rows(run[name], structure) for name in sites], 1))
            observed.append(torch.cat([v.to(structure.dtype) for v in values], 1))
            batches.append(filled)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return Simulations(
        torch.cat(latents),
        names,
        sites,
        torch.cat(observed),
        evaluation.on(whole),
    )


def require_rows(where: str, structure: t.Structure) -> None:
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


def of_rows(site: Any, structure: t.Structure) -> Tensor:
    """A site's value in one run, a flat row a datum."""
    value = site["value"]
    axis = value.dim() - len(site["fn"].event_shape) + structure.dim
    return columns(value.movedim(axis, 0), 1)


def columns(value: Any, keep: int) -> Tensor:
    """A value with all axes but the first ones flattened, in double precision."""
    return torch.as_tensor(value.reshape(*value.shape[:keep], -1)).double()


def column_names(
    run: dict[str, Any], sites: tuple[str, ...], structure: t.Structure
) -> tuple[str, ...]:
    """What the entries of flattened sites are called: ``z[0]``."""
    names: list[str] = []
    for name in sites:
        value = run[name]["value"]
        axis = value.dim() - len(run[name]["fn"].event_shape) + structure.dim
        shape = value.shape[:axis] + value.shape[axis + 1 :]
        places = itertools.product(*map(range, shape))
        names += [f"{name}[{','.join(map(str, i))}]" if i else name for i in places]
    return tuple(names)


def _arguments(
    where: str, run: dict[str, Any], batch: tuple[Tensor, ...], asked: Mapping[str, int]
) -> dict[str, int]:
    """By observed site, the place in the batch that its data came from."""
    found = {}
    for name, site in run.items():
        if not is_simulated(site):
            continue
        data = site["infer"]["obs"]
        same = [i for i, part in enumerate(batch) if part is data]
        same = same or [i for i, part in enumerate(batch) if _is_alike(part, data)]
        place = asked.get(name, same[0] if len(same) == 1 else None)
        if place is None or not -len(batch) <= place < len(batch):
            raise PairError(
                f"{where}: data of site '{name}'",
                "one argument of the pair that is these data, as it is or reshaped",
                "more than one" if len(same) > 1 else "none",
                [f"arguments={{'{name}': 0}}, the place of the argument", "obs=x, unchanged"],
            )
        if batch[place].numel() != site["value"].numel():
            raise PairError(
                f"{where}: data of site '{name}'",
                f"an argument of as many entries as the site's {tuple(site['value'].shape)}",
                f"argument {place} of shape {tuple(batch[place].shape)}",
            )
        found[name] = place
    if not found or len(set(found.values())) < len(found):
        raise PairError(
            where,
            "observed sites with an argument each",
            f"{found}" if found else "no observed site",
        )
    return found


def _is_alike(part: Tensor, data: Any) -> bool:
    alike = isinstance(data, Tensor) and part.numel() == data.numel()
    return alike and torch.equal(part.reshape(data.shape).to(data.dtype), data)


def _put_back(
    where: str,
    run: dict[str, Any],
    batch: tuple[Tensor, ...],
    arguments: dict[str, int],
    structure: t.Structure,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The simulated data, flat, and the batch with them; masked entries stay as they were."""
    filled = list(batch)
    for name, site in run.items():
        mask = mask_of(site)
        if mask is None:
            continue
        if name not in arguments:
            refuse_mask(where, site)
        old = batch[arguments[name]].reshape(site["value"].shape)
        site["value"] = torch.where(mask, site["value"], old.to(site["value"].dtype))
    for name, place in arguments.items():
        part = batch[place]
        filled[place] = run[name]["value"].reshape(part.shape).to(part.dtype)
    return [of_rows(run[name], structure) for name in arguments], tuple(filled)


def refuse_mask(where: str, site: Any) -> None:
    """Refuses a latent with a mask, as padding has it."""
    if mask_of(site) is not None:
        raise UndefinedError(
            f"{where}: site '{site['name']}'",
            "latents without a mask",
            "a mask, under which latents belong to no datum",
            ["data without padding"],
        )


def mask_of(site: Any) -> Tensor | None:
    """The mask of a site's entries, by a handler or in its distribution; None without one."""
    fn, value = site["fn"], site["value"]
    found = [(site["mask"], len(fn.event_shape))]
    while isinstance(fn, (torch.distributions.Independent, MaskedDistribution)):
        if isinstance(fn, MaskedDistribution):
            found.append((internals.mask_of(fn), len(fn.event_shape)))
        fn = fn.base_dist
    masks = [
        mask.reshape(mask.shape + (1,) * events).expand(value.shape)
        for mask, events in found
        if isinstance(mask, Tensor)
    ]
    return functools.reduce(torch.logical_and, masks) if masks else None


def _check_joint(
    where: str,
    before: tuple[Tensor, ...],
    after: tuple[Tensor, ...],
    run: dict[str, Any],
    structure: t.Structure,
) -> None:
    """Refuses a model whose density of the same (z, x) depends on the argument that x came from."""
    given = {name: run[name]["value"] for name in structure.latents}
    data = {name: site["value"] for name, site in run.items() if is_simulated(site)}
    fixed = poutine.condition(poutine.uncondition(structure.model), data=data)
    with probing((structure.model, structure.guide)):
        first = t.compute(replace(structure, model=fixed), before, given=given)
        second = t.compute(structure, after, given=given)
    for name, site in second.sites.items():
        if site.log_p is None or site.kind == "penalty":
            continue
        other = first.sites[name].log_p
        assert other is not None  # noqa: S101
        size = other.abs().max().clamp(min=1.0)
        if not bool((site.log_p - other).abs().max() <= 1e-4 * size):
            raise PairError(
                f"{where}: site '{name}'",
                "a density of (z, x) that is the same with the simulated data as arguments",
                "another: the model reads x besides observing it, or changes it first",
                ["obs=x, unchanged", "x itself in no other distribution of the model"],
            )
