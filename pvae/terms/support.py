"""Data checked against the support of the site that observes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from pyro.distributions import constraints
from torch import Tensor

from pvae.data import Source, check_rows, first_batch
from pvae.errors import PairError
from pvae.pair import Structure, observed_sites, probing, run_pair

__all__ = ["check_data", "with_constant_bounds"]

_Independent = type(constraints.independent(constraints.real, 1))


def check_data(structure: Structure, source: Source, where: str = "data") -> None:
    """Refuses NaN, infinity, and values outside the support of the site that observes them.

    Raises:
        DataError: Naming the first offending row.
    """
    found = _support(structure, source)
    if found is None:
        check_rows(source, where=where)
    else:
        check_rows(source, *found, where=where)


def _support(
    structure: Structure, source: Source
) -> tuple[Callable[[Tensor], Tensor], str, list[str]] | None:
    """The support of the site that observes the first array as it is; None if none does."""
    batch = first_batch(source, 64)
    try:
        with probing((structure.model, structure.guide)):
            _, trace = run_pair(structure.model, structure.guide, batch)
    except PairError:  # a pair of fixed size: Pyro's validation looks at the first batch
        return None
    for name, site in observed_sites(structure, trace, batch).items():
        if not site.is_itself or site.place != 0 or site.mask is not None:
            continue
        try:
            support = trace.nodes[name]["fn"].support
        except NotImplementedError:
            return None
        while isinstance(support, _Independent):
            support = support.base_constraint
        if constraints.is_dependent(support):
            return None
        general = with_constant_bounds(support)
        if general is None:
            return None
        words = f"values in the support of site '{name}', {general}"
        return general.check, words, _fixes(general)
    return None


def with_constant_bounds(support: Any) -> Any:
    """The constraint with its bounds as numbers; None if they differ from row to row."""
    if isinstance(support, _Independent):
        base = with_constant_bounds(support.base_constraint)
        return base and constraints.independent(base, support.reinterpreted_batch_ndims)
    general = copy.copy(support)
    for name, bound in vars(support).items():
        if isinstance(bound, Tensor):
            if bound.numel() == 0 or bool((bound != bound.flatten()[0]).any()):
                return None
            setattr(general, name, bound.flatten()[0].item())
    return general


def _fixes(support: Any) -> list[str]:
    if support is constraints.boolean or type(support) is type(constraints.boolean):
        return [
            "binarize='dynamic' (pvae.data.load) or (x > 0.5)",
            "likelihoods.Bernoulli(..., grey_values=True), which is no normalised density",
            "likelihoods.Gaussian, for real values; Binomial(total_count=255), for bytes",
        ]
    if "upper_bound" in vars(support):
        return ["total_count or levels that cover the data", "scale of the data"]
    return []
