"""Data checked against the support of the site that observes them."""

from __future__ import annotations

import copy

from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

from pvae.data import Source, Support, check_rows, first_batch
from pvae.errors import PairError
from pvae.limits import support_of
from pvae.pair import Structure, observed_sites, probing, run_pair
from pvae.types import Dist

__all__ = ["check_data", "with_constant_bounds"]

_CODES = ["rows = y >= 0, and every array as array[rows]: a code below 0 says that it is missing"]
_Independent = type(constraints.independent(constraints.real, 1))


def check_data(structure: Structure, source: Source, where: str = "data") -> None:
    """Refuses NaN, infinity, and values outside the support of the site that observes them.

    Batches of a ``DataLoader``, and items of a ``Dataset``, are checked as they are read, from now
    on.

    Raises:
        DataError: Naming the first offending row.
    """
    supports = {
        place: Support(support.check, _words(site, support), _fixes(support))
        for place, (site, support) in _supports(structure, source).items()
    }
    codes = Support(lambda codes: codes >= 0, "codes of categories, from 0 on", _CODES)
    check_rows(source, dict.fromkeys(structure.categories, codes) | supports, where)


def _supports(structure: Structure, source: Source) -> dict[int, tuple[str, Constraint]]:
    """By place in the batch, the site that observes that entry as it is, and its support."""
    batch = first_batch(source, 64)
    try:
        with probing((structure.model, structure.guide)):
            _, trace = run_pair(structure.model, structure.guide, batch)
    except PairError:  # a pair of fixed size: Pyro's validation looks at the first batch
        return {}
    supports: dict[int, tuple[str, Constraint]] = {}
    for name, site in observed_sites(structure, trace, batch).items():
        if site.is_itself and site.place is not None and site.mask is None:
            support = _support_of(trace.nodes[name]["fn"])
            if support is not None:
                supports.setdefault(site.place, (name, support))
    return supports


def _support_of(fn: Dist) -> Constraint | None:
    """A distribution's support; None if it has none, or one that differs from row to row."""
    support = support_of(fn)
    if support is None or constraints.is_dependent(support):
        return None
    return with_constant_bounds(support)


def _words(site: str, support: Constraint) -> str:
    return f"values in the support of site '{site}', {support}"


def with_constant_bounds(support: Constraint) -> Constraint | None:
    """The constraint with its bounds as numbers; None if they differ from row to row."""
    if isinstance(support, _Independent):
        base = with_constant_bounds(support.base_constraint)
        return base and constraints.independent(base, support.reinterpreted_batch_ndims)
    if isinstance(support, constraints.MixtureSameFamilyConstraint):  # that of each component
        return with_constant_bounds(support.base_constraint)
    general = copy.copy(support)
    for name, bound in vars(support).items():
        if isinstance(bound, Tensor):
            if bound.numel() == 0 or bool((bound != bound.flatten()[0]).any()):
                return None
            setattr(general, name, bound.flatten()[0].item())
    return general


def _fixes(support: Constraint) -> list[str]:
    if type(support) is type(constraints.boolean):
        return [
            "binarize='dynamic' (pvae.data.load) or (x > 0.5)",
            "likelihoods.Bernoulli(..., grey_values=True), which is no normalised density",
            "likelihoods.Gaussian, for real values; Binomial(total_count=255), for bytes",
        ]
    if "upper_bound" in vars(support):
        return ["total_count or levels that cover the data", "scale of the data"]
    return []
