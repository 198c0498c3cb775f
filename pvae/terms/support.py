"""Data checked against the support of the site that observes them."""

from __future__ import annotations

import copy

from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

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
    site, support = _support(structure, source)
    if support is None:
        check_rows(source, where=where)
    else:
        words = f"values in the support of site '{site}', {support}"
        check_rows(source, support.check, words, _fixes(support), where=where)


def _support(structure: Structure, source: Source) -> tuple[str, Constraint | None]:
    """The site that observes the first array as it is, and its support; None if that isn't one."""
    batch = first_batch(source, 64)
    try:
        with probing((structure.model, structure.guide)):
            _, trace = run_pair(structure.model, structure.guide, batch)
    except PairError:  # a pair of fixed size: Pyro's validation looks at the first batch
        return "", None
    for name, site in observed_sites(structure, trace, batch).items():
        if site.is_itself and site.place == 0 and site.mask is None:
            try:
                support = trace.nodes[name]["fn"].support
            except NotImplementedError:
                return name, None
            while isinstance(support, _Independent):
                support = support.base_constraint
            dependent = constraints.is_dependent(support)
            return name, None if dependent else with_constant_bounds(support)
    return "", None


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
