"""Leave-one-out cross-validation, where it means something."""

from __future__ import annotations

from typing import Any, Unpack

from arviz_stats import loo_approximate_posterior
from xarray import DataTree

from pvae.errors import UndefinedError, check_int, oxford
from pvae.export.plan import require_whole
from pvae.export.trees import to_arviz
from pvae.options import Options, tool
from pvae.pair import PairLike, Structure
from pvae.terms import prepared

__all__ = ["loo"]


@tool
def loo(
    pair: PairLike,
    data: object,
    *,
    num_particles: int = 1000,
    max_bytes: float = 2**31,
    **options: Unpack[Options],
) -> Any:
    r"""The expected log density of data left out, for a pair whose latents are all global.

    .. math::
        \mathrm{elpd} = \sum_n \log p(x_n | x_{-n}), \quad
        p(x_n | x_{-n}) \approx \frac{\sum_s w_{ns}\, p(x_n | g_s)}{\sum_s w_{ns}}, \quad
        w_{ns} = \frac{p(x, g_s)}{q(g_s)\, p(x_n | g_s)}, \quad g_s \sim q(g)

    The weights, which correct for the guide as well as for the datum left out, are smoothed by
    ArviZ (PSIS); its Pareto k of each datum says where that isn't enough. It is computed by
    ``arviz.loo_approximate_posterior`` on an export.

    With latents of data there is no such number: log p(x_n | z_n) at z_n from q(z | x_n) has seen
    x_n, and leaving it out would leave z_n without data. `pvae.bounds.evidence` on held-out data
    is the predictive density then.

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
        ArviZ's ``ELPDData``, pointwise, for ``arviz.compare`` and ``arviz.plot_khat``. It prints
        itself.

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
        require_whole("loo", structure, evaluation.source)
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
    stats = tree["sample_stats"]
    return loo_approximate_posterior(
        DataTree.from_dict({"/log_likelihood": total.to_dataset()}),
        log_p=stats["log_p"],
        log_q=stats["log_q"],
        pointwise=True,
    )


def _require_global(structure: Structure) -> None:
    local = (*structure.latents, *structure.enumerated)
    if local:
        raise UndefinedError(
            "loo",
            "a pair whose latents are all outside the data plate",
            f"{oxford(local)} inside it: log p(x | z) at z ~ q(z | x) has seen x",
            [
                "bounds.evidence on held-out data",
                "the difference of two pairs' bounds.evidence(...).values, datum by datum",
            ],
        )
    if structure.points:
        raise UndefinedError(
            "loo",
            "a guide with a density, whose draws can be weighted",
            f"a point mass at {oxford(sorted(structure.points))}",
            ["a guide with a density, such as AutoNormal"],
        )
