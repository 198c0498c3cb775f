"""Calls of what takes a pair and data: bounds, diagnostics, latents, export, plots, tests."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import zuko
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pvae
from pvae import bounds, diagnostics, export, latent, mmd, objectives, plots, testing
from tests.calls.table import D, N, Q, call, codes, factors, normal, rows, vae

mpl.use("Agg")
QUIET: dict[str, Any] = {"progress": False}


def regression(device: torch.device) -> tuple[Any, Any]:
    """A global latent with a guide of Pyro's."""

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(D, device=x.device), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x[..., 1:].sum(-1) + w.sum(-1), 1.0), obs=x[..., 0])

    pyro.get_param_store().clear()
    return model, AutoNormal(model, init_scale=0.2)


@call("bounds.elbo", "pvae.Estimate", "estimate.Estimate", draws=True)
def elbo(device: torch.device) -> Any:
    return bounds.elbo(vae(device), rows(device), 3), bounds.elbo(vae(device), rows(device, 200))


@call("bounds.evidence", "bounds.AIS", draws=True)
def evidence(device: torch.device) -> Any:
    pair, x = vae(device), rows(device)
    short = bounds.AIS(num_temperatures=3, num_leapfrog=2, num_pilot=1)
    return [
        bounds.evidence(pair, x, 20),
        bounds.evidence(pair, x, 20, method="cubo"),
        bounds.evidence(pair, x[:4], 2, method="ais", ais=short, **QUIET),
    ]


@call("pvae.Pair", "pair.Pair", draws=True)
def a_guide_of_pyros(device: torch.device) -> Any:
    pair, x = pvae.Pair(*regression(device)), rows(device)
    run = pvae.fit(pair, x, epochs=2, batch_size=24, device=device, **QUIET)
    return run.history[-1]["loss"], bounds.elbo(pair, x, 5), bounds.evidence(pair, x, 50)


@call("bounds.bdmc", "bounds.Sandwich", draws=True)
def bdmc(device: torch.device) -> Any:
    ais = bounds.AIS(num_temperatures=3, num_leapfrog=2, num_pilot=1)
    return bounds.bdmc(vae(device), rows(device)[:4], 2, ais=ais, **QUIET)


@call("bounds.iwae_curve", "bounds.Curve", "bounds.compare", "bounds.Comparison", draws=True)
def iwae_curve(device: torch.device) -> Any:
    curve = bounds.iwae_curve(vae(device), rows(device), 32)
    both = {
        "a": curve.estimates[1],
        "b": bounds.evidence(vae(device, prior="laplace"), rows(device), 1),
    }
    return curve, str(bounds.compare(both))


@call("bounds.log_weights", "bounds.fit_locally", "bounds.LocalFit", draws=True)
def log_weights(device: torch.device) -> Any:
    found: list[Any] = [bounds.log_weights(vae(device), rows(device), 20)]
    options = {"device": device, **QUIET}
    with pvae.terms.prepared(vae(device), rows(device)[:4], options) as evaluation:
        short = bounds.LocalFit(max_steps=3)
        found += [fit.log_weights for fit in bounds.fit_locally(evaluation, short, 5)]
    return found


@call("diagnostics.active_units", "diagnostics.hoyer", "diagnostics.near_zero", draws=True)
def activity(device: torch.device) -> Any:
    z = codes(device)
    found = diagnostics.active_units(vae(device), rows(device))
    return found, diagnostics.hoyer(z), diagnostics.near_zero(z)


@call("diagnostics.against_nuts", "diagnostics.AgainstNUTS", draws=True)
def against_nuts(device: torch.device) -> Any:
    short: dict[str, Any] = {"num_samples": 10, "num_warmup": 5, "num_chains": 2}
    pair = regression(device)
    found = diagnostics.against_nuts(pair, rows(device), num_particles=20, **short, **QUIET)
    return found.nuts.shape, found.guide


@call(
    *("diagnostics.aggregated_posterior", "diagnostics.AggregatedPosterior"),
    *("plots.aggregated_posterior", "plots.Picture"),
    draws=True,
)
def aggregated_posterior(device: torch.device) -> Any:
    found = diagnostics.aggregated_posterior(
        vae(device), rows(device, 60), num_rows=50, num_permutations=9
    )
    plots.aggregated_posterior(found)
    return found


@call(
    *("diagnostics.gradient_noise", "diagnostics.GradientNoise"),
    *("diagnostics.compare_objectives", "diagnostics.ObjectiveComparison"),
    draws=True,
)
def gradients(device: torch.device) -> Any:
    both = {"a": objectives.ELBO(), "b": objectives.IWAE(3)}
    pair, x = vae(device), rows(device)
    found = [diagnostics.gradient_noise(pair, x, num_repeats=3)]
    found += diagnostics.compare_objectives(pair, x, both, num_repeats=3).by_name.values()
    return [(noise.sides, noise.parameters) for noise in found]


@call(
    *("diagnostics.dci", "diagnostics.DCI", "diagnostics.mig", "diagnostics.sap"),
    *("diagnostics.irs", "diagnostics.factor_vae_score", "diagnostics.Score"),
    *("diagnostics.disentanglement", "diagnostics.Disentanglement"),
)
def scores(device: torch.device) -> Any:
    z, found = codes(device), list[Any]()
    few: dict[str, Any] = {"num_replicates": 2, "num_trees": 2}
    for given in (factors(torch.device("cpu")), factors(device)):
        found += [getattr(diagnostics, n)(z, given) for n in ("mig", "sap", "irs")]
        found.append(diagnostics.factor_vae_score(z, given))
        found.append(diagnostics.dci(z, given, num_trees=2))
        found.append(diagnostics.disentanglement(z, given, **few).errors)
    return found


@call("diagnostics.gap", "diagnostics.Gap", draws=True)
def gap(device: torch.device) -> Any:
    short = bounds.LocalFit(max_steps=3)
    options: dict[str, Any] = {"num_particles": 20, "local": short, "flow": False}
    return diagnostics.gap(vae(device), rows(device)[:4], **options).log_weights


@call(
    *("diagnostics.importance", "diagnostics.Importance", "diagnostics.JointImportance"),
    "diagnostics.khat",
    draws=True,
)
def importance(device: torch.device) -> Any:
    x = rows(device)
    found = [diagnostics.importance(vae(device), x, num_particles=50).khat]
    found.append(diagnostics.importance(regression(device), x, num_particles=50).khat)
    return found, diagnostics.khat(normal(device, 100, 3))


@call(
    *("diagnostics.learning_curve", "diagnostics.LearningCurve"),
    *("plots.learning_curve", "plots.training_curve"),
    draws=True,
)
def learning_curve(device: torch.device) -> Any:
    run = pvae.fit(vae(device), rows(device), epochs=12, device=device, **QUIET)
    found = diagnostics.learning_curve(run.history)
    plots.learning_curve(found)
    plots.training_curve(run)
    return found.values


@call(
    *("diagnostics.pit", "diagnostics.PIT", "diagnostics.predictive", "diagnostics.Statistic"),
    *("diagnostics.PredictiveCheck", "diagnostics.PredictiveChecks"),
    draws=True,
)
def predictive(device: torch.device) -> Any:
    pair, x = vae(device), rows(device)
    found = [diagnostics.predictive(pair, x, kind=k, num_particles=20) for k in ("mixed", "prior")]
    pair = vae(device, likelihood="gaussian")
    values = diagnostics.pit(pair, normal(device, N, D), num_particles=20).values
    return found, (values * 21).long()  # ranks; where in its cell a value is, is drawn


@call(
    *("diagnostics.sbc", "diagnostics.SBC", "diagnostics.tarp", "diagnostics.TARP"),
    *("diagnostics.Uniformity", "plots.calibration"),
    draws=True,
)
def calibration(device: torch.device) -> Any:
    pair, x = vae(device), rows(device)
    few: dict[str, Any] = {"num_simulations": 20, "num_particles": 9}
    found = diagnostics.sbc(pair, x, **few), diagnostics.tarp(pair, x, **few)
    plots.calibration(found[0])
    return [result.ranks for result in found]


@call("diagnostics.sensitivity", "diagnostics.surgery", "diagnostics.Surgery", draws=True)
def surgery(device: torch.device) -> Any:
    pair, x = vae(device), rows(device)
    found = diagnostics.sensitivity(pair, x), diagnostics.sensitivity(pair, x, num_probes=2)
    return found, diagnostics.surgery(pair, x)


@call("diagnostics.trial", "diagnostics.Trial", draws=True)
def trial(device: torch.device) -> Any:
    return diagnostics.trial(vae(device), rows(device), num_steps=3)


@call(
    *("pvae.diagnose", "diagnostics.diagnose", "diagnostics.Diagnosis", "diagnostics.Finding"),
    "diagnostics.Result",
    draws=True,
)
def diagnose(device: torch.device) -> Any:
    found = diagnostics.diagnose(vae(device), rows(device, 60), num_particles=30, **QUIET)
    return sorted(found.results), sorted(found.undefined), len(str(found)) > 0


@call("export.to_arviz", "export.loo", draws=True)
def to_arviz(device: torch.device) -> Any:
    pair, x = vae(device), rows(device)
    tree = export.to_arviz(pair, x, num_particles=3, **QUIET)
    arrays = {n: np.asarray(v) for n, v in tree["posterior"].data_vars.items()}
    return arrays, export.loo(regression(device), x, num_particles=50, **QUIET).elpd


@call("latent.codes", "latent.sample", draws=True)
def latents(device: torch.device) -> Any:
    pair, x = vae(device), rows(device)
    found = latent.codes(pair, x), latent.codes(pair, x, num_particles=3)
    return found, latent.sample(pair, x, 5)


@call("latent.fit_density", "latent.with_prior", draws=True)
def densities(device: torch.device) -> Any:
    z, found = codes(device), {}
    flow = zuko.flows.MAF(Q, transforms=1, hidden_features=[4])
    for name, kind in {"gaussian": "gaussian", "gmm": "gmm", "flow": flow}.items():
        density = latent.fit_density(z, kind, num_components=2, num_steps=3, **QUIET)
        pair = latent.with_prior(vae(device), density)
        found[name] = density().log_prob(z), latent.sample(pair, rows(device), 5)
    return found


@call(
    *("latent.analogy", "latent.attribute_vector", "latent.interpolate", "latent.jeffreys"),
    *("latent.nearest", "latent.precision_at_k", "latent.traverse", "pvae.kl"),
    draws=True,
)
def arithmetic(device: torch.device) -> Any:
    z, labels = codes(device), factors(device)[:, 0]
    close = latent.nearest(z, z, 3)
    q, p = (dist.Normal(normal(device, 4, 2) + s, 1.0).to_event(1) for s in (0.0, 1.0))
    return [
        *(latent.analogy(*z[:3]), latent.traverse(z[0], [0, 1], [-1.0, 0.0, 1.0]), close),
        *(latent.attribute_vector(z, has) for has in (labels > 0, (labels > 0).cpu().numpy())),
        *(latent.interpolate(z[:1], z[1:2], 3, kind) for kind in ("linear", "spherical")),
        *(latent.precision_at_k(y, y, close[0]) for y in (labels, labels.cpu().numpy())),
        *(
            latent.jeffreys(q, p),
            pvae.kl(q, p),
            pvae.kl(dist.StudentT(3.0, q.mean, 1.0).to_event(1), p, 100),
        ),
    ]


@call(
    "mmd.mmd", "mmd.two_sample_test", "mmd.TwoSampleTest", "mmd.kernel_named", "mmd.median_kernel"
)
def discrepancy(device: torch.device) -> Any:
    x, y = codes(device), codes(device) + 0.5
    kernels = (mmd.kernel_named("imq", Q), mmd.median_kernel(x))
    tests = mmd.two_sample_test(x, y, num_permutations=9)
    return [mmd.mmd(x, y, kernel) for kernel in kernels], tests


@call(
    *("plots.as_images", "plots.grid", "plots.latent_map", "plots.manifold"),
    *("plots.reconstructions", "plots.samples"),
)
def pictures(device: torch.device) -> Any:
    pair, x, shape = vae(device), rows(device), (2, 3)
    again = pair.reconstruct(x)
    plots.grid([x[:4], again[:4]], event_shape=shape)
    plots.latent_map(codes(device), factors(device)[:, 0])
    plots.manifold(pair.decode, 3, shape)
    plots.reconstructions(x, again, 3, shape)
    plots.samples(x[:4], 2, shape)
    return plots.as_images(x, shape)


@call("testing.check_pair", "testing.check_conditional", draws=True)
def conformance(device: torch.device) -> Any:
    pair = vae(device)
    testing.check_pair(pair, rows(device))
    testing.check_conditional(pair.guide.posterior, rows(device))
    testing.check_conditional(pair.model.prior)
    return True
