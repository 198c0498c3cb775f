"""Replicated data sets, for the checks that compare data with what the model makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pyro import distributions as dist
from torch import Tensor
from tqdm import tqdm

from pvae.distributions import base_of
from pvae.errors import ArgumentError, UndefinedError, oxford
from pvae.pair import is_inside
from pvae.simulate.ancestral import Origin, Simulation
from pvae.simulate.draws import check_generative, draws
from pvae.terms import Evaluation
from pvae.types import Dist

__all__ = ["CheckKind", "Replicates"]

CheckKind = Literal["mixed", "prior", "posterior", "aggregated"]
"""What a replicate is: see `pvae.diagnostics.predictive`."""

_ORIGINS: dict[str, Origin] = {
    "mixed": "mixed",
    "prior": "prior",
    "posterior": "posterior",
    "aggregated": "posterior",
}


@dataclass(frozen=True)
class Replicates:
    """A pair and data, ready to be replicated at one observed site.

    Attributes:
        evaluation: The pair and its data.
        site: The observed site.
        kind: What a replicate is.
        observed: The data at that site, shape ``(N, *event_shape)``.
        mask: Which entries count, of the same shape; None if all do.
        fn: The site's distribution.
    """

    evaluation: Evaluation
    site: str
    kind: CheckKind
    observed: Tensor
    mask: Tensor | None
    fn: Dist

    @classmethod
    def of(
        cls, where: str, evaluation: Evaluation, site: str | None, kind: CheckKind
    ) -> Replicates:
        """Looks at pair and data together, and refuses what has no replicates."""
        if kind not in _ORIGINS:
            raise ArgumentError("kind", f"one of {', '.join(_ORIGINS)}", repr(kind))
        evaluation = evaluation.in_memory()
        structure = evaluation.structure
        if kind == "aggregated" and not structure.latents:
            raise UndefinedError(
                where,
                "latents of data, whose guides are averaged under kind='aggregated'",
                "none",
                ["kind='mixed'"],
            )
        check_generative(where, evaluation, _ORIGINS[kind])
        data, masks = [], []
        for _, _, run in draws(evaluation, 1, _ORIGINS[kind]):
            name = _observed_site(where, run, site)
            data.append(run.data(name))
            masks.append(run.mask(name))
        fn = run.site(name)["fn"]
        mask = None if masks[0] is None else torch.cat([m for m in masks if m is not None])
        if mask is not None and kind == "aggregated":
            raise UndefinedError(
                where,
                "data without a mask, as rows change places under kind='aggregated'",
                f"a mask at site '{name}'",
                ["kind='mixed'", "kind='posterior'"],
            )
        return cls(evaluation, name, kind, torch.cat(data), mask, fn)

    def blocks(self, num_particles: int) -> Iterator[Tensor]:
        """Replicated data sets, shape ``(k, N, *event_shape)``, k of them at a time."""
        num_rows = len(self.observed)
        parts: list[Tensor] = []
        passes = draws(self.evaluation, num_particles, _ORIGINS[self.kind])
        hidden = not self.evaluation.progress
        with tqdm(total=num_particles, desc="replicates", unit="draw", disable=hidden) as bar:
            for chosen, rows, run in passes:
                parts.append(run.value(self.site))
                if rows.stop < num_rows:
                    continue
                block = torch.cat(parts, 1)
                if self.kind == "aggregated":
                    others = torch.randint(num_rows, block.shape[:2], device=block.device)
                    block = block[torch.arange(len(block), device=block.device)[:, None], others]
                yield block
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
        unordered = (
            dist.Categorical,
            dist.OneHotCategorical,
            dist.VonMises,
            dist.VonMises3D,
            dist.ProjectedNormal,
        )
        if isinstance(fn, unordered):
            raise UndefinedError(
                where,
                f"ordered values at site '{self.site}'",
                f"{type(fn).__name__}, whose values have no order",
                [
                    "statistic=lambda x: x.double(), if the classes are ordered",
                    "diagnostics.predictive, with statistics of your own",
                ],
            )


def _observed_site(where: str, run: Simulation, site: str | None) -> str:
    """The site that was asked for, or the only one of the data."""
    structure = run.structure
    local = [name for name in structure.observed if is_inside(structure, run.site(name))]
    if site is None and len(local) == 1:
        return local[0]
    if site in local:
        return site
    raise UndefinedError(
        where,
        "site=NAME, an observed site inside the data plate",
        f"{site!r}; there are: {oxford(local) if local else 'none'}",
        [f"site='{name}'" for name in local[:2]],
    )
