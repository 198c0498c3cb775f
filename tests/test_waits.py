"""No training step waits for the device, whatever it is made of; what torch waits for is named."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import zuko
from torch import Tensor

import pvae
from pvae import SVI, VAE, corruptions, likelihoods, penalties, priors, recipes, schedules
from pvae import objectives as o
from pvae.engine import Stepper, make_optimizer
from pvae.objectives.table import ALL
from pvae.pair import Pair
from tests import fits

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("store")]
D, Q, N = 6, 2, 12
Make = Callable[[], VAE]


def check_step(
    gpu: torch.device, vae: VAE, objective: Any = None, optimizer: Any = None, **options: Any
) -> None:
    """Of the pair: in the first two, torch sets itself up."""
    vae.to(gpu)
    x = torch.rand(N, D, generator=torch.Generator().manual_seed(0)).round().to(gpu)
    objective = objective or o.ELBO()
    structure = Pair(vae.model, vae.guide).inspect((x,))
    parameters = list(structure.parameters.values())
    own = make_optimizer(optimizer or torch.optim.Adam, parameters, 1e-3)
    state = objective.make_state(structure, 100)
    stepper = Stepper(structure, objective, own, state, options.pop("clip_norm", None), **options)
    for step in range(2):
        stepper((x,), step)
    torch.cuda.set_sync_debug_mode("error")
    stepper((x,), 2)
    torch.cuda.set_sync_debug_mode("default")
    assert stepper.look() is None


def vae(**options: Any) -> VAE:
    return recipes.vae(D, Q, hidden=(4,), **options)


OBJECTIVES: dict[str, o.Objective] = {
    "ELBO": o.ELBO(),
    "IWAE": o.IWAE(3),
    "MultiplyWeightedIWAE": o.MultiplyWeightedIWAE(2, num_means=2),
    "CIWAE": o.CIWAE(3),
    "Renyi": o.Renyi(3, alpha=0.5),
    "PIWAE": o.PIWAE(2, num_means=2),
    "DReG": o.DReG(3),
    "CUBO": o.CUBO(3),
    "STL": o.STL(2),
    "VIMCO": o.VIMCO(3),
    "RWS": o.RWS(3),
    "TVO": o.TVO(3),
    "FreeBits": o.FreeBits(floor=0.1),
    "Capacity": o.Capacity(capacity=schedules.Warmup(5, end=2.0)),
    "GECO": o.GECO(tolerance=4.0),
    "TCVAE": o.TCVAE(),
    "InfoVAE": o.InfoVAE(),
    "DIPVAE": o.DIPVAE(),
    "FactorVAE": o.FactorVAE(hidden=(4,)),
}
MORE: dict[str, o.Objective] = {
    "a schedule": o.ELBO(beta=schedules.Cyclical(4), penalty_weight=schedules.Cosine(4)),
    "particles one by one": o.IWAE(3, vectorize_particles=False),
    "TCVAE weighted": o.TCVAE(weights="weighted"),
    "InfoVAE rbf": o.InfoVAE(kernel="rbf", alpha=0.5),
    "DIPVAE 1": o.DIPVAE(kind=1),
    "FreeBits by site": o.FreeBits(floor=schedules.Warmup(5, end=0.1), per="site"),
    "STL with a weight": o.STL(2, beta=schedules.Warmup(5)),
}


@pytest.mark.parametrize("name", [*OBJECTIVES, *MORE])
def test_objectives(name: str, gpu: torch.device) -> None:
    check_step(gpu, vae(), (OBJECTIVES | MORE)[name])


PENALTIES: dict[str, Callable[[], VAE]] = {
    "MMD": lambda: vae(penalties=penalties.MMD(1.0)),
    "Activations": lambda: vae(penalties=penalties.Activations(0.1, output=True)),
    "Contractive": lambda: vae(penalties=penalties.Contractive(0.1)),
    "WeightDecay": lambda: vae(penalties=penalties.WeightDecay(0.1)),
    "Custom": lambda: vae(penalties=penalties.Custom(lambda x, z: z.square().sum(-1), 0.1)),
    "Commitment": lambda: recipes.vq_vae(D, Q, hidden=(4,)),
    "Contractive, probes": lambda: vae(penalties=penalties.Contractive(0.1, num_probes=1)),
    "MMD rbf": lambda: vae(penalties=penalties.MMD(1.0, kernel="rbf")),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(name: str, gpu: torch.device) -> None:
    check_step(gpu, PENALTIES[name]())


OPTIMIZERS: dict[str, Any] = {
    "amsgrad": functools.partial(torch.optim.Adam, amsgrad=True),
    "foreach": functools.partial(torch.optim.Adam, foreach=True),
    "decay": functools.partial(torch.optim.AdamW, weight_decay=0.1),
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "centred": functools.partial(torch.optim.RMSprop, centered=True, momentum=0.9),
    **{
        name: getattr(torch.optim, name)
        for name in ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam")
    },
    **{name: getattr(torch.optim, name) for name in ("RAdam", "Rprop", "ASGD")},
}
WAITING = {"Adafactor", "LBFGS", "SparseAdam", "Muon"}
"""Torch's other optimisers: one reads numbers of the device at each step, others are refused."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, gpu: torch.device) -> None:
    check_step(gpu, vae(), optimizer=OPTIMIZERS[name], clip_norm=0.1)


LIKELIHOODS: dict[str, Callable[[], VAE]] = {
    "Bernoulli": vae,
    "Binomial": lambda: vae(likelihood=lambda n, e: likelihoods.Binomial(n, e, total_count=3)),
    "Categorical": lambda: vae(likelihood=lambda n, e: likelihoods.Categorical(n, e, levels=3)),
    **{
        f"Gaussian {sigma}": lambda sigma=sigma: vae(  # type: ignore[misc]
            likelihood=lambda n, e: likelihoods.Gaussian(n, e, sigma=sigma)
        )
        for sigma in ("optimal", "shared", "feature", "predicted", 0.5)
    },
}
PRIORS: dict[str, Callable[[], VAE]] = {
    name: lambda name=name: vae(prior=getattr(priors, name))  # type: ignore[misc]
    for name in ("StandardNormal", "Normal", "Laplace", "Flat")
}
FLOWS: dict[str, Callable[[], VAE]] = {
    "MAF": lambda: vae(prior=lambda d: zuko.flows.MAF(Q, transforms=1, hidden_features=[4])),
    "NSF": lambda: vae(prior=lambda d: zuko.flows.NSF(Q, transforms=1, hidden_features=[4])),
}
CORRUPTIONS: dict[str, Callable[[], VAE]] = {
    type(c).__name__: lambda c=c: recipes.denoising_ae(D, Q, hidden=(4,), corruption=c)  # type: ignore[misc]
    for c in (
        corruptions.Masking(0.3),
        corruptions.Noise(0.1),
        corruptions.SaltAndPepper(0.2),
    )
}
PARTS = LIKELIHOODS | PRIORS | FLOWS | CORRUPTIONS


@pytest.mark.parametrize("name", PARTS)
def test_parts(name: str, gpu: torch.device) -> None:
    check_step(gpu, PARTS[name]())


@pytest.mark.parametrize("name", list(recipes.named))
def test_recipes(name: str, gpu: torch.device) -> None:
    is_wide = name == "sparse_ae"
    build = recipes.named(name)
    check_step(gpu, build(D, 8) if is_wide else build(D, Q, hidden=(4,)))


@pytest.mark.float32
def test_bfloat16(gpu: torch.device) -> None:
    check_step(gpu, vae(), precision="bf16")


def test_images(gpu: torch.device) -> None:
    """Corruptions and networks of images."""
    for corruption in (corruptions.BlockMasking(2), corruptions.Downsampling(2)):
        x = torch.rand(3, 1, 8, 8, device=gpu)
        torch.cuda.set_sync_debug_mode("error")
        corruption(x)
        torch.cuda.set_sync_debug_mode("default")
    pair = recipes.vae((1, 8, 8), Q, network="conv").to(gpu)
    structure = Pair(pair.model, pair.guide).inspect((x.round(),))
    own = make_optimizer(torch.optim.Adam, list(structure.parameters.values()), 1e-3)
    stepper = Stepper(structure, o.ELBO(), own, o.ELBO().make_state(structure))
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        stepper((x.round(),), step)


def test_nothing_is_left_out() -> None:
    """What is new in pvae, or in torch, has to be put into one of the tables above."""
    assert {kind.__name__ for kind in ALL} == {*OBJECTIVES}
    named = {*penalties.__all__} - {"Penalty", "SideOutputs", "named", "on_side", "penalise"}
    assert named - {"recorded_activations"} <= {*PENALTIES}
    assert {*likelihoods.__all__} - {"Likelihood", "named", "Gaussian"} <= {*LIKELIHOODS}
    assert {*priors.__all__} - {"named"} - {"StudentT"} == {*PRIORS}
    of_images = {"BlockMasking", "Downsampling"}
    assert {*corruptions.__all__} - {"Corruption", "named"} - of_images == {*CORRUPTIONS}
    theirs = {name for name in torch.optim.__all__ if name[0].isupper()} - {"Optimizer"}
    assert theirs - {*OPTIMIZERS} - WAITING == set()


TORCHS: dict[str, tuple[Callable[[], Any], str]] = {
    "StudentT": (lambda: vae(prior=priors.StudentT), "copy"),
    "NICE": (
        lambda: vae(prior=lambda d: zuko.flows.NICE(Q, transforms=2, hidden_features=[4])),
        "nonzero|index",
    ),
}


@pytest.mark.parametrize("name", TORCHS)
def test_what_torch_and_zuko_wait_for(name: str, gpu: torch.device) -> None:
    """As docs/pairs.md says; where this fails it can be struck there."""
    build, words = TORCHS[name]
    with pytest.raises(Exception, match=f"synchronizing CUDA operation.*({words})"):
        check_step(gpu, build())


def test_fit_reads_a_data_set_without_waiting(gpu: torch.device) -> None:
    """Its order is brought to the host once an epoch; batches go by pinned memory."""
    rows = torch.utils.data.TensorDataset(fits.binary(300))
    for data in (rows, torch.utils.data.DataLoader(rows, 8)):
        run = pvae.fit(fits.vae(), data, epochs=1, device=gpu, progress=False)
        stepper: Any = run.training.stepper
        batches: Any = run.training.batches.epoch(1)
        with pyro.validation_enabled(is_validate=False):
            stepper(next(batches), 3)
            torch.cuda.set_sync_debug_mode("error")
            stepper(next(batches), 4)
            torch.cuda.set_sync_debug_mode("default")


def test_svi(gpu: torch.device) -> None:
    """The loss is read when its number is asked for."""
    pair, x = vae().to(gpu), torch.rand(N, D, device=gpu).round()
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
    losses = [svi.step(x) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    total = torch.zeros((), device=gpu, dtype=torch.float64)
    losses.append(svi.step(x))
    total += losses[-1] / N
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        float(losses[-1])
    torch.cuda.set_sync_debug_mode("default")
    assert isinstance(losses[-1], Tensor)
    assert float(total) == pytest.approx(float(losses[-1]) / N)
    assert f"{losses[-1]:.3f}" == f"{float(losses[-1]):.3f}"
    assert losses[-1] > 0
    assert np.mean(losses) == pytest.approx(sum(map(float, losses)) / 3)
    assert np.asarray(losses).dtype == np.float64
    assert float(losses[0]) != float(losses[1])  # it is no place that the next step writes to


def test_svi_on_the_cpu() -> None:
    """A number, as Pyro's own has it."""
    pair = vae()
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
    assert type(svi.step(torch.rand(N, D).round())) is float
