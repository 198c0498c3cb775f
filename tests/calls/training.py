"""Calls that train: `fit`, `SVI`, every objective, penalty, recipe, part; and the command line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import pvae
from pvae import corruptions, guides, likelihoods, objectives, penalties, priors, recipes, schedules
from pvae.cli import app
from pvae.conditional import Conditional
from tests.calls.table import D, Q, call, rows, vae

SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 12, "progress": False}


def fitted(pair: pvae.VAE, device: torch.device, **options: Any) -> list[Any]:
    """What a short training ends with."""
    torch.manual_seed(1)
    run = pvae.fit(pair, rows(device), device=device, **{**SHORT, **options})
    losses = [{k: v for k, v in r.items() if k in ("loss", "valid_loss")} for r in run.history]
    return [losses, pair.state_dict()]


@call("pvae.fit", "pvae.Fit", "pvae.load_parameters", draws=True)
def fit(device: torch.device) -> Any:
    """Saved, resumed and loaded."""
    x, pair = rows(device), vae(device)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"device": device, "batch_size": 12, "progress": False}
        options |= {"folder": folder, "valid": x, "clip_norm": 1.0}
        pvae.fit(pair, x, epochs=1, **options)
        run = pvae.fit(pair, x, epochs=2, resume=True, **options)
        other = vae(device)
        pvae.load_parameters(other, Path(folder) / "checkpoint.safetensors", x)
    return run.history[-1]["loss"], pair.state_dict(), other.state_dict()


@call("data.load", "data.Splits", "data.Data", draws=True)
def fit_from_the_host(device: torch.device) -> Any:
    x = rows(torch.device("cpu")).numpy()
    found = [fitted(vae(device), device)]
    own = torch.Generator().manual_seed(0)
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(x))
    loader = torch.utils.data.DataLoader(dataset, 12, generator=own)
    grey = pvae.data.Data((0.5 * x,), binarize="dynamic")
    for data in (x, x.astype(np.float64), loader, grey):
        run = pvae.fit(vae(device), data, device=device, **SHORT)
        found.append(run.history[-1]["loss"])
    digits = pvae.data.load("digits", binarize="static", valid=0.1).train
    torch.manual_seed(0)
    run = pvae.fit(recipes.vae(64, Q, hidden=(4,)), digits, device=device, epochs=1, progress=False)
    return found, run.history[-1]["loss"]


@call("pvae.SVI", "svi.SVI", "svi.Loss", draws=True)
def svi(device: torch.device) -> Any:
    pair = vae(device)
    steps = pvae.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), objectives.ELBO())
    torch.manual_seed(1)
    return [float(steps.step(rows(device))) for _ in range(3)], pair.state_dict()


@call("objectives.as_objective", "objectives.Objective", draws=True)
def pyros_objective(device: torch.device) -> Any:
    loss = objectives.as_objective(pyro.infer.TraceMeanField_ELBO())
    return fitted(vae(device), device, objective=loss)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "Capacity": {"capacity": 2.0},
    "GECO": {"tolerance": 5.0},
    "FactorVAE": {"hidden": (8,)},
}
NAMES = [name for name in objectives.__all__ if name[0].isupper()]


@call(*(f"objectives.{n}" for n in NAMES), "objectives.named", draws=True)
def every_objective(device: torch.device) -> Any:
    found = {}
    for name in NAMES:
        if name not in ("Objective", "ObjectiveState"):
            objective = getattr(objectives, name)(**OBJECTIVES.get(name, {}))
            found[name] = fitted(vae(device), device, objective=objective)
    return found


@call("schedules.Warmup", "schedules.Cyclical", "schedules.Constant", draws=True)
def weights_by_schedule(device: torch.device) -> Any:
    kinds = (schedules.Warmup(4), schedules.Cyclical(4), schedules.Constant(0.5))
    return [fitted(vae(device), device, objective=objectives.ELBO(beta=s)) for s in kinds]


@call(
    *("schedules.Cosine", "schedules.Schedule", "schedules.Timed", "schedules.as_schedule"),
    draws=True,
)
def rates_by_schedule(device: torch.device) -> Any:
    rate = schedules.as_schedule("lr", schedules.Cosine(4))
    return fitted(vae(device), device, lr_schedule=rate)


@call(
    *(f"recipes.{name}" for name in recipes.__all__ if name[0].islower()),
    "penalties.Commitment",  # in vq_vae
    draws=True,
)
def every_recipe(device: torch.device) -> Any:
    found = {}
    for name in recipes.__all__:
        if name[0].islower() and name not in ("named", "rebuilt"):
            torch.manual_seed(0)
            made = getattr(recipes, name)(D, Q, **({} if name == "sparse_ae" else {"hidden": (4,)}))
            torch.manual_seed(0)
            pair = recipes.rebuilt(made.recipe)
            found[name] = fitted(pair, device), pvae.bounds.elbo(pair, rows(device))
    return found


PENALTIES = {
    "MMD": lambda: penalties.MMD(1.0),
    "Activations": lambda: penalties.Activations(0.1),
    "Contractive": lambda: penalties.Contractive(0.1),
    "Custom": lambda: penalties.Custom(lambda x, z: z.square().sum(-1), 0.1),
    "WeightDecay": lambda: penalties.WeightDecay(0.1),
}
OWN = ("Penalty", "SideOutputs", "named", "on_side", "penalise", "recorded_activations")


@call(*(f"penalties.{name}" for name in (*PENALTIES, *OWN)), "sites.penalty", draws=True)
def every_penalty(device: torch.device) -> Any:
    found = {}
    for name, make in PENALTIES.items():
        found[name] = fitted(vae(device, penalties=make()), device)
    return found


@call(
    *("priors.Flat", "priors.Laplace", "priors.Normal", "priors.StandardNormal"),
    *("priors.StudentT", "priors.named"),
    draws=True,
)
def every_prior(device: torch.device) -> Any:
    kinds = [n for n in priors.__all__ if n[0].isupper()]
    return {n: fitted(vae(device, prior=getattr(priors, n)), device) for n in kinds}


LIKELIHOODS: dict[str, Any] = {
    "Bernoulli": {},
    "Binomial": {"total_count": 3},
    "Categorical": {"levels": 3},
    **{f"Gaussian {s}": {"sigma": s} for s in ("optimal", "shared", "feature", "predicted", 0.5)},
}
CLASSES = ("Bernoulli", "Binomial", "Categorical", "Gaussian", "Likelihood", "named")


@call(*(f"likelihoods.{name}" for name in CLASSES), "vae.VAE", "pvae.VAE", draws=True)
def every_likelihood(device: torch.device) -> Any:
    found = {}
    for name, options in LIKELIHOODS.items():
        kind = getattr(likelihoods, name.split()[0])
        pair = vae(device, likelihood=lambda n, e, k=kind, o=options: k(n, e, **o))
        found[name] = fitted(pair, device), pair.sample(3, seed=1), pair.reconstruct(rows(device))
    return found


@call("guides.MeanField", "guides.NearestCode", "guides.Point", "guides.CodeDelta", draws=True)
def every_guide(device: torch.device) -> Any:
    found = {}
    for name in ("MeanField", "NearestCode", "Point"):
        pair = vae(
            device, guide=getattr(guides, name), prior="flat" if name != "MeanField" else "normal"
        )
        found[name] = fitted(pair, device), pair.encode(rows(device))
    return found


@call(*(f"corruptions.{name}" for name in corruptions.__all__), "guides.named", draws=True)
def every_corruption(device: torch.device) -> Any:
    flat = (corruptions.Masking(0.3), corruptions.Noise(0.1), corruptions.SaltAndPepper(0.2))
    images = rows(device, 4, 64).reshape(4, 1, 8, 8)
    found: list[Any] = []
    for corruption in flat:
        torch.manual_seed(0)
        pair = recipes.denoising_ae(D, Q, hidden=(4,), corruption=corruption)
        found.append(fitted(pair, device))
    found.append(corruptions.BlockMasking(3)(images))
    found.append(corruptions.Downsampling(2)(images))
    return found


class Halved(Conditional):
    """A part by hand."""

    def __init__(self) -> None:
        super().__init__(Q)
        self.layer = nn.Linear(D, Q)

    def forward(self, *context: Tensor) -> Any:
        return pyro.distributions.Normal(self.layer(context[0]), 0.5).to_event(1)


@call("vae.Guide", "vae.Model", "pvae.Guide", "pvae.Model", "pvae.Conditional", draws=True)
def programs_of_parts(device: torch.device) -> Any:
    torch.manual_seed(0)
    made = pvae.VAE(priors.Normal(Q), likelihoods.Gaussian(nn.Linear(Q, D), D, sigma=1.0), Halved())
    pair = (made.model.to(device), made.guide.to(device))
    return pvae.bounds.elbo(pair, rows(device), 4), made.guide.posterior(rows(device)).mean


COMMANDS = {
    "sample": ["-n", "7", "--to"],
    "encode": ["--to"],
    "reconstruct": ["--to"],
    "export": ["-n", "5", "-K", "3", "--to"],
    "diagnose": ["--rows", "60", "-K", "30", "--to"],
}


@call(
    *(f"cli.{name}" for name in (*COMMANDS, "train", "evaluate", "doctor", "app")),
    draws=True,
)
def every_command(device: torch.device) -> Any:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    with tempfile.TemporaryDirectory() as folder:
        path, on = f"{folder}/run", ("--device", str(device))
        run("train", "--out", path, "--data", "digits", "--epochs", "1", "--hidden", "8", *on)
        run("evaluate", path, "-K", "3", *on)
        assert device.type in run("doctor")
        for name, options in COMMANDS.items():
            end = {"export": "nc", "diagnose": "json"}.get(name, "npy")
            run(name, path, *options, f"{folder}/{name}.{end}", *on)
        arrays = [np.load(f"{folder}/{name}.npy") for name in ("sample", "encode", "reconstruct")]
        return arrays, len(json.loads(Path(f"{folder}/diagnose.json").read_text())["findings"])
