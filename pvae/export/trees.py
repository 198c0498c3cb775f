"""Draws and log densities as an ArviZ tree of labelled arrays, and leave-one-out from it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch
from arviz_base import dict_to_dataset
from arviz_stats import loo_approximate_posterior
from numpy.typing import ArrayLike
from tqdm import tqdm
from xarray import Dataset, DataTree

import pvae
from pvae import diagnostics
from pvae.bounds.weights import require_whole
from pvae.diagnostics.importance import FEWEST
from pvae.errors import ArgumentError, UndefinedError, check_int, check_number, oxford
from pvae.export.plan import GROUPS, Plan, Variable, fill
from pvae.options import Options, progress_bar, tool
from pvae.pair import PairLike, Structure
from pvae.simulate import Simulation, draws
from pvae.terms import prepared

if TYPE_CHECKING:
    from arviz_stats.utils import ELPDData

__all__ = ["loo", "to_arviz"]


@tool
def to_arviz(
    pair: PairLike,
    data: object,
    *,
    num_particles: int = 200,
    groups: Sequence[str] | None = None,
    mean: bool = False,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    max_bytes: float = 2**31,
    **options: Unpack[Options],
) -> DataTree:
    r"""Draws from a pair, with their log densities, as ArviZ wants them.

    ======================== =================================================================
    group                    variables
    ======================== =================================================================
    ``posterior``            latents from the guide, q(z | x)
    ``posterior_predictive`` observed sites from p(x | z) at these latents; for latents of data
                             those are reconstructions
    ``log_likelihood``       log p(x | z) of each observed site
    ``log_prior``            log p(z) of each latent, given those that it depends on
    ``sample_stats``         ``log_p`` = log p(x, z), ``log_q`` = log q(z | x), ``log_weight``
                             = log p - log q, and ``khat``, the weights' Pareto shape for
                             each datum (see `pvae.diagnostics.khat`)
    ``prior``                latents from the model
    ``prior_predictive``     observed sites from p(x | z) at these latents
    ``observed_data``        observed sites
    ``constant_data``        what else the pair is called with: labels, covariates, masks
    ======================== =================================================================

    Dimensions are ``chain`` (one), ``draw``, the data plate's name for what is inside it, names
    of other plates, and ``NAME_dim_0``, ... for the event of site NAME. Draws from a guide are
    independent: r-hat and effective sample sizes say nothing here, and ``arviz.summary(tree,
    kind="stats")`` leaves them out.

    With global latents all data share each draw of them, and ``sample_stats`` are of the whole
    data set. Where all latents are point masses, ``posterior``, ``log_likelihood`` and
    ``sample_stats`` have one draw, and there is no log q. What has no meaning for a
    pair is left out, and the root's attribute ``left_out`` says why; asked for by name it is
    refused.

    Entries of data that are masked out are drawn, too: those of ``posterior_predictive`` are
    imputations. In ``observed_data`` they are NaN, and in no log likelihood.

    How much prior and likelihood matter for what all data share is said by power-scaling:
    ``arviz_stats.psense_summary(to_arviz(pair, x))`` weights the draws as if either were raised to
    a power near 1, as far as these draws are the posterior's (`pvae.diagnostics.importance`).

    Log likelihoods of latents of data have seen the data, so that ``arviz.loo`` on them estimates
    nothing. `loo` computes it where it means something.

    References:
        ArviZ a unified library for exploratory analysis of Bayesian models in Python
        (Kumar et al., 2019), https://doi.org/10.21105/joss.01143

        Detecting and Diagnosing Prior and Likelihood Sensitivity with Power-Scaling
        (Kallioinen et al., 2024), https://doi.org/10.1007/s11222-023-10366-5

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_particles: S, draws.
        groups: Some of `GROUPS`; None for all that have a meaning for the pair.
        mean: Predictive groups have the means of p(x | z) instead of draws.
        coords: Coordinates by dimension, such as ``{"data": names}``.
        dims: Names of a site's event dimensions, such as ``{"z": ["unit"]}``.
        max_bytes: Bound on the size of what is returned, in bytes.
        options: As in `pvae.options.Options`.

    Returns:
        An ``xarray.DataTree``, which ArviZ 1 takes, and ``arviz.preview`` before it.
        ``.to_netcdf(path)`` writes it, ``xarray.open_datatree(path)`` reads it, and
        ``arviz.from_netcdf(path)`` makes what the other functions of ArviZ 0.23 take.

    Raises:
        ArgumentError: If an argument can't be used, or the export would exceed ``max_bytes``.
        UndefinedError: If a group was asked for that has no meaning for the pair.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> tree = to_arviz(vae, torch.zeros(5, 4), num_particles=10)
        >>> dict(tree["posterior"].sizes)
        {'chain': 1, 'draw': 10, 'data': 5, 'z_dim_0': 2}
    """
    check_int("num_particles", num_particles)
    check_number("max_bytes", max_bytes, above=0)
    if groups is not None:
        _check_names("groups", groups or ["none"], GROUPS)
    with prepared(pair, data, options, "to_arviz") as evaluation:
        structure = evaluation.structure
        plan = Plan(evaluation.in_memory(), num_particles, dict(dims or {}), mean=mean)
        for name in groups or GROUPS:
            plan.add(name, is_asked=groups is not None)
        _check_names("dims", plan.dims, plan.sites)
        plan.check_size(max_bytes)
        arrays = _arrays(plan)
    khat = _khat(plan, arrays.get(("sample_stats", "log_weight")))
    attributes = {
        "pvae_version": pvae.__version__,
        "quantity": structure.quantity,
        "num_particles": num_particles,
        "seed": evaluation.seed,
        "predictive": "means of p(x | z)" if mean else "draws from p(x | z)",
        "left_out": "; ".join(f"{name}: {why}" for name, why in plan.left_out.items()),
        "removed_scales": oxford(structure.removed_scales) if structure.removed_scales else "",
        "training_terms": oxford(structure.training_terms) if structure.training_terms else "",
        "factors": oxford(structure.factors) if structure.factors else "",
    }
    return _tree(plan, arrays, khat, attributes, coords or {})


def _check_names(where: str, names: Iterable[str], known: Sequence[str]) -> None:
    if wrong := [name for name in names if name not in known]:
        raise ArgumentError(
            where, f"some of {oxford(known)}", oxford(wrong), [f"{where}={known[:1]!r}"]
        )


def _arrays(plan: Plan) -> dict[tuple[str, str], np.ndarray]:
    """What is filled from draws, by group and name."""
    arrays: dict[tuple[str, str], np.ndarray] = {}
    for origin, variables, count in plan.runs():
        passes = draws(plan.evaluation, count, origin, mean=plan.mean, score=True)
        shown = plan.evaluation.progress
        with progress_bar(total=count, title=origin, unit="draw", shown=shown) as bar:
            arrays |= fill(variables, _counted(passes, bar))
    return arrays


def _khat(plan: Plan, log_weight: np.ndarray | None) -> np.ndarray | None:
    """k-hat of each datum, or of the data set's weights; None if there aren't enough of those."""
    if log_weight is None:
        return None
    if len(log_weight) < FEWEST:
        plan.left_out["khat"] = f"{FEWEST} draws are the fewest for a tail"
        return None
    each = torch.from_numpy(log_weight.reshape(len(log_weight), -1))
    return diagnostics.khat(each).numpy().reshape(log_weight.shape[1:])


Passes = Iterable[tuple[slice, slice, Simulation]]


def _counted(passes: Passes, bar: tqdm) -> Passes:
    """The same passes, their draws counted by a progress bar."""
    for chosen, rows, run in passes:
        yield chosen, rows, run
        if rows.start == 0:
            bar.update(chosen.stop - chosen.start)


def _tree(
    plan: Plan,
    arrays: dict[tuple[str, str], np.ndarray],
    khat: np.ndarray | None,
    attributes: dict[str, object],
    coords: Mapping[str, ArrayLike],
) -> DataTree:
    """The arrays, labelled, group by group."""
    rows = (_plain(plan.structure.plate),)
    variables: dict[str, list[Variable]] = {}
    for v in plan.variables:
        variables.setdefault(v.group, []).append(v)
    groups = {}
    for group, some in variables.items():
        data = {v.name: arrays[group, v.name] for v in some}
        dims = {v.name: [*rows[: v.num_rows is not None], *v.dims] for v in some}
        with_draws = some[0].num_draws is not None
        groups[group] = _dataset(data, dims, coords, attributes, with_draws=with_draws)
    if plan.constants:
        own = {k: () if k in plan.shared else rows for k in plan.constants}
        dims = {k: [*own[k], *_dims(k, a.ndim - len(own[k]))] for k, a in plan.constants.items()}
        constants = _dataset(plan.constants, dims, coords, attributes, with_draws=False)
        groups["constant_data"] = constants
    if khat is not None:
        groups["sample_stats"]["khat"] = (rows[: khat.ndim], khat)
    tree = DataTree.from_dict({f"/{n}": groups[n] for n in GROUPS if n in groups})
    known = {*rows, *(str(dim) for group in tree.children.values() for dim in group.dims)}
    _check_names("coords", sorted(coords), sorted(known))
    tree.attrs.update(attributes)
    return tree


def _dims(name: str, count: int) -> list[str]:
    return [f"{name}_dim_{i}" for i in range(count)]


def _dataset(
    data: dict[str, np.ndarray],
    dims: dict[str, list[str]],
    coords: Mapping[str, ArrayLike],
    attributes: dict[str, object],
    *,
    with_draws: bool,
) -> Dataset:
    """One group."""
    named: dict[Hashable, Sequence[Hashable]] = {
        _plain(k): [_plain(dim) for dim in names] for k, names in dims.items()
    }
    used = {dim for names in named.values() for dim in names}
    return dict_to_dataset(
        {_plain(k): a[None] if with_draws else a for k, a in data.items()},
        attrs=attributes,
        inference_library=pvae,
        dims=named,
        coords={dim: values for dim, values in coords.items() if dim in used},
        sample_dims=["chain", "draw"] if with_draws else [],
    )


def _plain(name: str) -> str:
    """A name without slashes, which separate groups."""
    return name.replace("/", ".")


@tool
def loo(
    pair: PairLike,
    data: object,
    *,
    num_particles: int = 1000,
    max_bytes: float = 2**31,
    **options: Unpack[Options],
) -> ELPDData:
    r"""The expected log density of data left out, for a pair whose latents are all global.

    .. math::
        \mathrm{elpd} = \sum_n \log p(x_n | x_{-n}), \quad
        p(x_n | x_{-n}) \approx \frac{\sum_s w_{ns}\, p(x_n | g_s)}{\sum_s w_{ns}}, \quad
        w_{ns} = \frac{p(x, g_s)}{q(g_s)\, p(x_n | g_s)}, \quad g_s \sim q(g)

    The weights, which correct for the guide as well as for the datum left out, are smoothed by
    ArviZ (PSIS); its Pareto k of each datum says where that isn't enough. It is computed by
    ``arviz.loo_approximate_posterior`` on an export.

    States of a datum that the model sums out, as a mixture's assignments, are no draws, and stay
    in its density. With latents of data there is no such number: log p(x_n | z_n) at z_n from
    q(z | x_n) has seen x_n, and leaving it out would leave z_n without data.
    `pvae.bounds.evidence` on held-out data is the predictive density then.

    References:
        Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation and WAIC
        (Vehtari, Gelman & Gabry, 2017), https://arxiv.org/abs/1507.04544
        Bayesian Leave-One-Out Cross-Validation for Large Data (Magnusson et al., 2019),
        https://arxiv.org/abs/1904.10679

    Arguments:
        pair: A model and its guide.
        data: All data that the guide was fitted to.
        num_particles: S, draws of the global latents.
        max_bytes: Bound on the size of the log likelihoods, in bytes.
        options: As in `pvae.options.Options`.

    Returns:
        ArviZ's ``ELPDData``, pointwise, for ``arviz.compare`` and ``arviz.plot_khat``.

    Raises:
        UndefinedError: If there are latents of data, a point-mass guide, or only some of the data.

    Example:
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("mean", dist.Normal(x.mean(), len(x) ** -0.5))
        >>> int(loo((model, guide), torch.zeros(20)).n_data_points)
        20
    """
    check_int("num_particles", num_particles, minimum=25)
    with prepared(pair, data, options, "loo") as evaluation:
        evaluation = evaluation.in_memory()
        structure = evaluation.structure
        _require_global(structure)
        require_whole("loo", structure, evaluation.num_rows)
    tree = to_arviz(
        evaluation.pair,
        evaluation.source,
        num_particles=num_particles,
        groups=("log_likelihood", "sample_stats"),
        max_bytes=max_bytes,
        **options,
    )
    each = [v for v in tree["log_likelihood"].data_vars.values() if structure.plate in v.dims]
    total = sum(each[1:], start=each[0]).rename("log_likelihood")
    log_p, log_q = (tree["sample_stats"][name] for name in ("log_p", "log_q"))
    likelihoods = DataTree.from_dict({"/log_likelihood": total.to_dataset()})
    return loo_approximate_posterior(likelihoods, log_p=log_p, log_q=log_q, pointwise=True)


def _require_global(structure: Structure) -> None:
    if local := structure.latents:
        raise UndefinedError(
            "loo",
            "a pair whose latents are all outside the data plate",
            f"{oxford(local)} inside it: log p(x | z) at z ~ q(z | x) has seen x",
            [
                "bounds.evidence on held-out data",
                "the difference of two pairs' bounds.evidence(...).values, datum by datum",
            ],
        )
    if not structure.global_latents:
        expected = "latents outside the data plate, which the guide draws"
        fixes = ["bounds.evidence on held-out data, which is exact where states are summed out"]
        raise UndefinedError("loo", expected, "none", fixes)
    if structure.points:
        expected = "a guide with a density, whose draws can be weighted"
        actual = f"a point mass at {oxford(sorted(structure.points))}"
        raise UndefinedError("loo", expected, actual, ["AutoNormal, or another"])
