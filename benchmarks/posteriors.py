"""Ten posteriors of posteriordb: a guide of dependent normals, what is said of it, and NUTS.

    python benchmarks/posteriors.py [--data-dir DIR] [--only NAME]

Pairs are written in the manner of Pyro's users, with inputs standardised; all latents are shared by
the data, but for those of the eight schools. The guide is Pyro's ``AutoMultivariateNormal``, fitted
by 4,000 steps of Adam whose learning rate falls from 0.05 along a cosine, with no other settings,
in float64 and on one thread. Both BLR posteriors are farther from where it starts than these steps
reach: its weights say so. Chains start at draws of that guide. Moments are compared with those of
10,000 reference draws in ``posteriordb.json``, which is looked for in ``--data-dir`` or the
environment's PVAE_DATA. Writes ``benchmarks/results/posteriors.md``.

off        largest distance of a mean from the reference's, in the reference's standard deviations
sd         least and largest standard deviation, as a share of the reference's
k-hat, gap of joint weights (`diagnostics.importance`), with the worst verdict of its lines
evidence   log p(x) of all data by joint importance sampling; none under a flat prior
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from provenance import made_with
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from torch import Tensor

import pvae
from pvae import bounds, diagnostics, schedules
from pvae.errors import UndefinedError

RESULTS = Path(__file__).parent / "results"
Draws = dict[str, Tensor]
FLAT, POSITIVE = constraints.real_vector, constraints.positive


@dataclass(frozen=True)
class Posterior:
    """A model, what it is called with, and the reference's entries made of its latents."""

    model: Callable[..., None]
    batch: tuple[Tensor, ...]
    derived: Callable[[Draws], Draws] = lambda draws: draws
    start: Draws = field(default_factory=dict)  # where flat priors have no draw to start from


def tensors(data: dict[str, Any], *names: str) -> list[Tensor]:
    return [torch.tensor(data[name], dtype=torch.float64) for name in names]


def normal_around(loc: Tensor, sigma: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, sigma), obs=y)


def eight_schools(data: dict[str, Any]) -> Posterior:
    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            z = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)

    def derived(draws: Draws) -> Draws:
        theta = draws["mu"][:, None] + draws["tau"][:, None] * draws["theta_trans"]
        return {"theta": theta, "mu": draws["mu"], "tau": draws["tau"]}

    return Posterior(model, tuple(tensors(data, "y", "sigma")), derived)


def flat_regression(x: Tensor, y: Tensor, prior: dist.Distribution) -> Posterior:
    """Flat priors on the coefficients of ``(N, D)``, of orthogonal inputs and a scaled output."""
    size, unit = len(y) ** 0.5, y.std()
    q, r = torch.linalg.qr(x)
    back = torch.linalg.inv(r) * size * unit

    def model(q: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.ImproperUniform(FLAT, (), (q.shape[1],)))
        sigma = pyro.sample("sigma", prior)
        normal_around((q * beta).sum(-1) * unit, sigma, y)

    def derived(draws: Draws) -> Draws:
        return {"beta": draws["beta"] @ back.T, "sigma": draws["sigma"]}

    start = {"beta": torch.zeros(x.shape[1]), "sigma": unit}
    return Posterior(model, (q * size, y), derived, start)


def momiq(data: dict[str, Any]) -> Posterior:
    y, iq = tensors(data, "kid_score", "mom_iq")
    return flat_regression(torch.stack([torch.ones_like(iq), iq], 1), y, dist.HalfCauchy(2.5))


def interaction(data: dict[str, Any]) -> Posterior:
    y, hs, iq = tensors(data, "kid_score", "mom_hs", "mom_iq")
    x = torch.stack([torch.ones_like(iq), hs, iq, hs * iq], 1)
    return flat_regression(x, y, dist.HalfCauchy(2.5))


def mesquite(data: dict[str, Any]) -> Posterior:
    names = ("weight", "diam1", "diam2", "canopy_height", "total_height", "density", "group")
    weight, a, b, height, total, density, group = tensors(data, *names)
    columns = [a * b * height, a * b, a / b, total, density]
    logs = [column.log() for column in columns]
    x = torch.stack([torch.ones_like(a), *logs, group], 1)
    return flat_regression(x, weight.log(), dist.ImproperUniform(POSITIVE, (), ()))


def linear(data: dict[str, Any]) -> Posterior:
    """Columns of inputs are scaled, and priors with them."""
    x, y = tensors(data, "X", "y")
    unit = x.std(0)

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 10.0 * unit).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
        normal_around((x * beta).sum(-1), sigma, y)

    def derived(draws: Draws) -> Draws:
        return {"beta": draws["beta"] / unit, "sigma": draws["sigma"]}

    return Posterior(model, (x / unit, y), derived)


def autoregression(data: dict[str, Any]) -> Posterior:
    (y,) = tensors(data, "y")
    order = data["K"]
    lags = torch.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], 1)

    def model(lags: Tensor, y: Tensor) -> None:
        alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(order), 10.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
        normal_around(alpha + (lags * beta).sum(-1), sigma, y)

    return Posterior(model, (lags, y[order:]))


def mixture(data: dict[str, Any]) -> Posterior:
    """Without the order of the means: a guide is in one of two modes, whose labels are sorted."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(torch.full((2,), 2.0)).to_event(1))
        theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
        weights = dist.Categorical(torch.stack([theta, 1 - theta], -1))
        with pyro.plate("data", len(y)):
            parts = dist.Normal(mu, sigma)
            pyro.sample("y", dist.MixtureSameFamily(weights, parts), obs=y)

    def derived(draws: Draws) -> Draws:
        flip = (draws["mu"][:, 0] > draws["mu"][:, 1])[:, None]
        pairs = {k: torch.where(flip, draws[k].flip(1), draws[k]) for k in ("mu", "sigma")}
        theta = draws["theta"]
        return pairs | {"theta": torch.where(flip[:, 0], 1 - theta, theta)}

    return Posterior(model, tuple(tensors(data, "y")), derived)


def kilpisjarvi(data: dict[str, Any]) -> Posterior:
    """The line's height at the mean year, and its slope by decade; priors are the same."""
    x, y = tensors(data, "x", "y")
    middle = float(x.mean())

    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(10.0 * data["pmubeta"], 10 * data["psbeta"]))
        alpha = data["pmualpha"] + slope * middle / 10
        level = pyro.sample("level", dist.Normal(alpha, data["psalpha"]))
        sigma = pyro.sample("sigma", dist.ImproperUniform(POSITIVE, (), ()))
        normal_around(level + slope * x, sigma, y)

    def derived(draws: Draws) -> Draws:
        beta = draws["slope"] / 10
        return {"alpha": draws["level"] - beta * middle, "beta": beta, "sigma": draws["sigma"]}

    return Posterior(model, ((x - middle) / 10, y), derived, {"sigma": torch.ones(())})


def gaussian_process(data: dict[str, Any]) -> Posterior:
    """No plate counts its data: they are one draw of a process."""

    def model(x: Tensor, y: Tensor) -> None:
        rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))[..., None, None]
        alpha = pyro.sample("alpha", dist.HalfNormal(2.0))[..., None, None]
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))[..., None, None]
        apart = (x[:, None] - x).square()
        kernel = alpha**2 * (-apart / (2 * rho**2)).exp() + sigma * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)

    return Posterior(model, tuple(tensors(data, "x", "y")))


POSTERIORS: dict[str, Callable[[dict[str, Any]], Posterior]] = {
    "eight_schools-eight_schools_noncentered": eight_schools,
    "kidiq-kidscore_momiq": momiq,
    "kidiq-kidscore_interaction": interaction,
    "sblrc-blr": linear,
    "sblri-blr": linear,
    "arK-arK": autoregression,
    "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
    "kilpisjarvi_mod-kilpisjarvi": kilpisjarvi,
    "gp_pois_regr-gp_regr": gaussian_process,
    "mesquite-logmesquite_logvas": mesquite,
}


def compared(draws: Tensor, names: list[str], posterior: Posterior, reference: Any) -> list[str]:
    """How far means are off, and the range of standard deviations, of draws ``(S, D)``."""
    sites: dict[str, list[Tensor]] = {}
    for name, column in zip(names, draws.T, strict=True):
        sites.setdefault(name.split("[")[0], []).append(column)
    shapes = {name: ("[" in first) for name, first in ((n.split("[")[0], n) for n in names)}
    found = posterior.derived(
        {n: torch.stack(c, 1) if shapes[n] else c[0] for n, c in sites.items()}
    )
    off, ratios = [], []
    for entry, moments in reference.items():
        name, _, place = entry.rstrip("]").partition("[")
        column = found[name][:, int(place) - 1] if place else found[name]
        off.append(abs(float(column.mean()) - moments["mean"]) / moments["sd"])
        ratios.append(float(column.std()) / moments["sd"])
    return [f"{max(off):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]


def row(name: str, entry: dict[str, Any]) -> list[str]:
    posterior = POSTERIORS[name](entry["data"])
    pyro.clear_param_store()
    torch.manual_seed(0)
    started = time.process_time()
    start = init_to_value(values=posterior.start)
    guide = AutoMultivariateNormal(posterior.model, init_loc_fn=start)
    pair, batch = (posterior.model, guide), posterior.batch
    settings: dict[str, Any] = {"epochs": 4000, "batch_size": None, "lr": 0.05, "seed": 0}
    schedule = schedules.Cosine()
    pvae.fit(pair, batch, lr_schedule=schedule, engine="eager", progress=False, **settings)
    fitted = time.process_time() - started
    weights = diagnostics.importance(pair, batch, progress=False)
    lines = {line.name: line for line in weights.findings()}
    verdicts = [line.verdict for line in lines.values()]
    worst = next((v for v in ("bad", "look", "good") if v in verdicts), "none")
    try:
        evidence = bounds.evidence(pair, batch, progress=False)
        shown = f"{evidence.total:.2f} ± {evidence.se_total:.2f}"
    except UndefinedError:
        shown = "flat prior"
    started = time.process_time()
    nuts = diagnostics.against_nuts(pair, batch, progress=False)
    sampled = time.process_time() - started
    names = list(nuts.names)
    chains = nuts.nuts.flatten(0, 1)
    return [
        name,
        *compared(nuts.guide, names, posterior, entry["reference"]),
        " / ".join(
            f"{line.value:.2f}" for key, line in lines.items() if "k-hat" in key or "gap" in key
        )
        + f" {worst}",
        shown,
        *compared(chains, names, posterior, entry["reference"]),
        f"{float(nuts.rhat.max()):.3f}",
        f"{fitted:.0f} / {sampled:.0f}",
    ]


HEAD = (
    *("posterior", "q: off", "q: sd", "k-hat / gap, verdict", "evidence"),
    *("NUTS: off", "NUTS: sd", "R-hat", "seconds, q / NUTS"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default=os.environ.get("PVAE_DATA", "."))
    parser.add_argument("--only", choices=POSTERIORS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    entries = json.loads((Path(arguments.data_dir) / "posteriordb.json").read_text())
    started, rows = time.perf_counter(), []
    for name in [arguments.only] if arguments.only else POSTERIORS:
        rows.append(row(name, entries[name]))
        print(" | ".join(rows[-1]), flush=True)
    if arguments.only:
        return
    made = made_with(time.perf_counter() - started)
    lines = [
        "# Ten posteriors of posteriordb",
        "",
        f"Made by `python benchmarks/posteriors.py` at commit {made['commit']}, "
        f"torch {made['torch']}, in {made['minutes']} minutes.",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip().replace("\n", "  \n"),
        "",
        f"| {' | '.join(HEAD)} |",
        "|---" * len(HEAD) + "|",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]
    (RESULTS / "posteriors.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
