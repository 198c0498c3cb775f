"""Replicated data sets, for the checks that compare data with what the model makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro import distributions as dist
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from tqdm import tqdm

from pvae import terms as t
from pvae.errors import ArgumentError, UndefinedError, oxford

__all__ = ["CheckKind", "Replicates"]

CheckKind = Literal["mixed", "prior", "posterior", "aggregated"]
"""What a replicate is: see `pvae.diagnostics.predictive`."""

_OF_TERMS: dict[str, t.Kind] = {
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
        kept: Which entries aren't masked out, of the same shape; None if all are.
        fn: The site's distribution.
    """

    evaluation: t.Evaluation
    site: str
    kind: CheckKind
    observed: Tensor
    kept: Tensor | None
    fn: Any

    @classmethod
    def of(
        cls, where: str, evaluation: t.Evaluation, site: str | None, kind: CheckKind
    ) -> Replicates:
        """Looks at pair and data together, and refuses what has no replicates."""
        if kind not in _OF_TERMS:
            raise ArgumentError("kind", f"one of {', '.join(_OF_TERMS)}", repr(kind))
        evaluation = evaluation.in_memory()
        structure = evaluation.structure
        if kind == "aggregated" and not structure.latents:
            raise UndefinedError(
                where,
                "latents of data, whose guides are averaged under kind='aggregated'",
                "none",
                ["kind='mixed'"],
            )
        of_terms = _OF_TERMS[kind]
        t.check_generative(where, evaluation, of_terms)
        values, kept = [], []
        for _, _, terms in t.draws(evaluation, 1, of_terms):
            name = _observed_site(where, terms, structure, site)
            values.append(t.observed(terms, name))
            kept.append(t.kept_of(terms, name))
        fn = terms.sites[name].model
        mask = None if kept[0] is None else torch.cat([k for k in kept if k is not None])
        if mask is not None and kind == "aggregated":
            raise UndefinedError(
                where,
                "data without a mask, as rows change places under kind='aggregated'",
                f"a mask at site '{name}'",
                ["kind='mixed'", "kind='posterior'"],
            )
        observed = torch.cat(values)
        return cls(evaluation, name, kind, observed, mask, fn)

    def blocks(self, num_particles: int) -> Iterator[Tensor]:
        """Replicated data sets, shape ``(k, N, *event_shape)``, k of them at a time."""
        num_rows = len(self.observed)
        parts: list[Tensor] = []
        passes = t.draws(self.evaluation, num_particles, _OF_TERMS[self.kind])
        hidden = not self.evaluation.progress
        with tqdm(total=num_particles, desc="replicates", unit="draw", disable=hidden) as bar:
            for draws, rows, terms in passes:
                parts.append(t.replicate(terms, self.site))
                if rows.stop < num_rows:
                    continue
                block = torch.cat(parts, 1)
                if self.kind == "aggregated":
                    chosen = torch.randint(num_rows, block.shape[:2], device=block.device)
                    block = block[torch.arange(len(block), device=block.device)[:, None], chosen]
                yield block
                parts = []
                bar.update(draws.stop - draws.start)

    @property
    def has_honest_p_values(self) -> bool:
        """Whether a replicate owes nothing to the very datum that it is compared with."""
        return self.kind != "posterior" or not self.evaluation.structure.latents

    def labels(self) -> Callable[[Tensor], Tensor] | None:
        """From data to class numbers, where the data are classes; None where they aren't."""
        fn = _base_of(self.fn)
        if isinstance(fn, dist.OneHotCategorical):
            return lambda x: x.argmax(-1)
        return (lambda x: x) if type(fn) is dist.Categorical else None

    def require_order(self, where: str) -> None:
        """Refuses values that aren't ordered: classes and angles."""
        fn = _base_of(self.fn)
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


def _base_of(fn: Any) -> Any:
    while isinstance(fn, (torch.distributions.Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn


def _observed_site(where: str, terms: t.Terms, structure: t.Structure, site: str | None) -> str:
    """The site that was asked for, or the only one of the data."""
    local = [name for name in structure.observed if terms.sites[name].is_local]
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
