"""What `fit` refuses before it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from pyro.distributions import constraints
from torch import Tensor, nn

from pvae import terms as t
from pvae.data import Source, check_rows
from pvae.errors import ArgumentError, PairError, PvaeWarning, oxford
from pvae.terms.messages import sample_sites

__all__ = ["check_batch_norm", "check_data", "check_parameters"]


def check_data(model: Any, guide: Any, source: Source, where: str) -> None:
    """Refuses NaN, infinity, and values outside the support of the site that observes them."""
    found = _support(model, guide, source)
    try:
        if found is None:
            check_rows(source)
        else:
            support, words, fixes = found
            check_rows(source, support, words, fixes)
    except PairError:
        raise
    except ValueError as error:
        if where != "data" and hasattr(error, "where"):
            error.args = (str(error).replace("data", where, 1),)
        raise


def _support(
    model: Any, guide: Any, source: Source
) -> tuple[Callable[[Tensor], Tensor], str, list[str]] | None:
    """The support of the site that observes the first array as it is; None if none does.

    One row is traced, so that the support's own shape fits every batch.
    """
    batch = t.first_batch(source, 1)
    try:
        with t.probing((model, guide)):
            _, trace = t.run_pair(model, guide, batch)
    except PairError:  # a plate of fixed size: Pyro's validation looks at the first batch
        return None
    for site in sample_sites(trace):
        if not site["is_observed"] or site["value"] is not batch[0] or site["mask"] is not None:
            continue
        try:
            support = site["fn"].support
        except NotImplementedError:
            return None
        base = support
        while isinstance(base, type(constraints.independent(constraints.real, 1))):
            base = base.base_constraint
        if constraints.is_dependent(base):
            return None
        return base.check, f"values in the support of site '{site['name']}', {base}", _fixes(base)
    return None


def _fixes(support: Any) -> list[str]:
    if support is constraints.boolean:
        return [
            "binarize='dynamic' (pvae.data.load) or (x > 0.5)",
            "likelihoods.Bernoulli(..., grey_values=True), which is no normalised density",
            "likelihoods.Gaussian, for real values; Binomial(total_count=255), for bytes",
        ]
    if "integer" in str(support).lower() or "upper_bound" in vars(support):
        return ["total_count or levels that cover the data", "scale of the data"]
    return []


def check_batch_norm(structure: t.Structure, num_rows: int, batch_size: int) -> None:
    """Refuses a last batch of one row where batch norm needs two."""
    norms = [m for m in structure.modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms and (batch_size == 1 or num_rows % batch_size == 1):
        raise ArgumentError(
            "batch_size",
            "every batch with at least two rows, as batch norm needs in training",
            f"{num_rows} rows in batches of {batch_size}: the last one has a single row",
            [f"batch_size={batch_size + 1}", "one row fewer"],
        )


def check_parameters(structure: t.Structure) -> None:
    """Refuses a pair with nothing to train; warns of networks that won't be."""
    if structure.unannounced:
        warnings.warn(
            f"{oxford(structure.unannounced[:4])} are used by the pair but not announced, so they "
            "won't be trained. Call pyro.module(name, network) in the function, or make the model "
            "or guide a module that holds the network.",
            PvaeWarning,
            stacklevel=4,
        )
    if not structure.parameters:
        raise PairError(
            "pair",
            "at least one trainable parameter",
            "none",
            ["pyro.param or pyro.module in a function", "nn.Parameter in a module"],
        )
