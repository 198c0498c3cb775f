"""What tests run in several processes: torchrun ... distributed_process.py KIND FOLDER [ARGUMENTS].

Each process writes what it found to FOLDER/<scenario>.<rank>.json.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae import (
    VAE,
    corruptions,
    distributed,
    guides,
    likelihoods,
    objectives,
    penalties,
    recipes,
    schedules,
)
from pvae.data import Data, as_source
from pvae.data.sources import ArraySource
from pvae.engine import Asked
from pvae.errors import PvaeError
from pvae.fitting import History
from tests import pairs

D, Q, N, EPOCHS = 6, 2, 37, 4
KILL_AT = 13  # training passes of the guide; a checkpoint is due every third step
Record = dict[str, Any]


def rows(n: int = N) -> Tensor:
    return torch.rand(n, D, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def autoencoder() -> VAE:
    """Deterministic, with penalties on both sides."""
    terms = [penalties.WeightDecay(0.01), penalties.Contractive(0.1)]
    return recipes.ae(D, Q, hidden=(8,), activation=nn.Tanh, penalties=terms).double()


def fit_autoencoder(folder: Path | None = None, **options: Any) -> tuple[VAE, pvae.Fit]:
    """Batches of 9 of 37 rows: uneven parts, and in the last batch a process without any."""
    torch.manual_seed(distributed.current().rank)  # others than the first start from other weights
    ae = autoencoder()
    settings: Record = {
        "epochs": EPOCHS,
        "batch_size": 9,
        "lr": 1e-2,
        "lr_schedule": schedules.Cosine(),
        "clip_norm": 0.5,
        "valid": rows(11),
        "patience": 3,
        "progress": False,
        "folder": folder,
    }
    run = pvae.fit(ae, rows(), **(settings | options))
    return ae, run


def save_state(pair: VAE, path: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in pair.state_dict().items()}, path)


class Dying(pvae.Guide):
    """The second process kills itself in one of its passes, unless it has been restarted."""

    _passes = 0  # not public: it would be part of what the pair is made of

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self._passes += 1
            if self._passes == KILL_AT and distributed.current().rank and "DIE" in os.environ:
                _die(Path(os.environ["DIE"]))
        return super().forward(x, *context)


def _die(note: Path) -> None:
    if not distributed.restarts():
        note.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def stochastic_pair() -> VAE:
    """Dropout, and a guide that may kill its process."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2 * Q))
    vae = recipes.vae(D, Q, hidden=(8,))
    vae = VAE(vae.model.prior, vae.model.likelihood, guides.MeanField(encoder, Q)).double()
    vae.guide.__class__ = Dying
    return vae


def fit_stochastic(
    folder: Path, epochs: int = EPOCHS, engine: Asked = "auto"
) -> tuple[VAE, pvae.Fit]:
    """Draws everywhere: dropout, latents, dynamic binarisation."""
    vae = stochastic_pair()
    run = pvae.fit(
        vae,
        Data((rows().numpy(),), binarize="dynamic"),
        objectives.ELBO(beta=schedules.Warmup(2, "epochs")),
        epochs=epochs,
        batch_size=9,
        lr=1e-2,
        valid=rows(11).round(),
        folder=folder,
        resume=True,
        save_steps=3,
        engine=engine,
        progress=False,
    )
    return vae, run


# What the processes do together, in one go


def together(folder: Path) -> None:
    with distributed.joined("cpu") as world:
        for scenario in (equal, seen, draws, stochastic, refusals, disagreements, infinite, others):
            found = scenario(folder)
            (folder / f"{scenario.__name__}.{world.rank}.json").write_text(json.dumps(found))


def equal(folder: Path) -> Record:
    ae, run = fit_autoencoder(folder / "equal")
    save_state(ae, folder / f"equal.{distributed.current().rank}.safetensors")
    return {"history": list(run.history)}


class Noting(ArraySource):
    """Notes the rows of training batches."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(Data((x,)), x.device, x.dtype)
        self.random, self.epochs = True, list[list[int]]()

    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        if generator is not None:
            self.epochs.append(index.tolist())
        return super().rows(index, generator)


def seen(_: Path) -> Record:
    source = Noting(rows())
    ae = autoencoder()
    pvae.fit(ae, source, epochs=2, batch_size=9, progress=False)
    return {"batches": source.epochs}


class Recording(pvae.Guide):
    """Keeps what it draws in training."""

    def __init__(self, posterior: Any) -> None:
        super().__init__(posterior)
        self.drawn: list[list[float]] = []

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        z = super().forward(x, *context)
        if self.training and torch.is_grad_enabled():
            self.drawn.append(z[0].tolist())
        return z


def draws(_: Path) -> Record:
    """The same row everywhere, so that draws differ by their noise alone."""
    torch.manual_seed(0)
    vae = recipes.vae(D, Q, hidden=(8,)).double()
    guide = Recording(vae.guide.posterior).double()
    x = rows(1).round().expand(32, D)
    run = pvae.fit((vae.model, guide), x, epochs=20, batch_size=8, lr=1e-2, progress=False)
    dynamic = pvae.data.Batches(
        as_source(Data((rows(),), binarize="dynamic")), 9, world=distributed.current()
    )
    binary = [batch[0].tolist() for batch in dynamic.epoch(0) if batch]
    return {"drawn": guide.drawn[-80:], "loss": run.history["loss"], "binary": binary}


def stochastic(folder: Path) -> Record:
    vae, run = fit_stochastic(folder / "whole")
    save_state(vae, folder / f"whole.{distributed.current().rank}.safetensors")
    return {"history": list(run.history)}


@contextmanager
def _noting(found: Record, name: str) -> Iterator[None]:
    try:
        yield
        found[name] = "nothing"
    except PvaeError as error:
        found[name] = error.one_line()


class Centred(nn.Module):
    """Couples data in a way that no type tells."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if self.training else x


class Counting(nn.Module):
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return x


def _with_layer(layer: nn.Module) -> VAE:
    encoder = nn.Sequential(nn.Linear(D, 8), layer, nn.Linear(8, 2 * Q))
    vae = recipes.vae(D, Q, hidden=(8,))
    return VAE(vae.model.prior, vae.model.likelihood, guides.MeanField(encoder, Q)).double()


def _gaussian(sigma: float | str) -> VAE:
    likelihood = functools.partial(likelihoods.Gaussian, sigma=sigma)
    return recipes.vae(D, Q, hidden=(8,), likelihood=likelihood).double()


def refusals(_: Path) -> Record:
    cpu, found = torch.device("cpu"), dict[str, str]()

    def attempt(name: str, pair: Any, objective: Any = None, **options: Any) -> None:
        x = options.pop("data", rows().round())
        model, guide = pair if isinstance(pair, tuple) else (pair.model, pair.guide)
        settings: Record = {"epochs": 1, "batch_size": 9, "progress": False, **options}
        with _noting(found, name):
            pvae.fit((model, guide), x, objective, **settings)

    def vae() -> VAE:
        return recipes.vae(D, Q, hidden=(8,)).double()

    attempt("batch norm", _with_layer(nn.BatchNorm1d(8)))
    attempt("centred", _with_layer(Centred()))
    attempt("buffer", _with_layer(Counting()))
    attempt("layer norm", _with_layer(nn.LayerNorm(8)))
    attempt("optimal sigma", _gaussian("optimal"))
    attempt("shared sigma", _gaussian("shared"))
    attempt("MMD", recipes.wae(D, Q, hidden=(8,)).double())
    attempt("codebook", recipes.vq_vae(D, Q, hidden=(8,)).double())
    for kind in (objectives.TCVAE, objectives.FactorVAE, objectives.InfoVAE, objectives.DIPVAE):
        attempt(kind.__name__, vae(), kind())
    attempt("FreeBits", vae(), objectives.FreeBits())
    attempt("Capacity", vae(), objectives.Capacity(capacity=1.0))
    attempt("GECO", vae(), objectives.GECO(tolerance=3.0))
    attempt("baseline", vae(), objectives.ELBO(baseline="moving_average"))
    attempt("RenyiELBO", vae(), pyro.infer.RenyiELBO(num_particles=2))
    attempt("TraceMeanField_ELBO", vae(), pyro.infer.TraceMeanField_ELBO())
    attempt("IWAE", vae(), objectives.IWAE(3))
    attempt("DReG", vae(), objectives.DReG(3))
    attempt("denoising", recipes.denoising_ae(D, Q, corruption=corruptions.Masking(0.3)).double())
    attempt("loader", vae(), data=DataLoader(TensorDataset(rows().round()), batch_size=9))
    attempt("few rows", vae(), batch_size=1)
    for name in ("subsample_drawn", "global_latent", "autoguide", "two_sites", "subsample_given"):
        model, guide, batch = getattr(pairs, name)(cpu)
        attempt(name, (model, guide), data=batch, batch_size=None if "drawn" in name else 5)
    model, guide, batch = _unscaled_global()
    attempt("unscaled global", (model, guide), data=batch, batch_size=None)
    return found


def _unscaled_global() -> pairs.Pair:
    """A penalty outside a data plate that doesn't know the full size."""
    model, guide, batch = pairs.functions(torch.device("cpu"))

    def penalised(x: Tensor) -> None:
        model(x)
        pvae.sites.penalty("outside", x.new_tensor(1.0))

    return penalised, guide, batch


def disagreements(folder: Path) -> Record:
    """Processes that were called with different things."""
    found: Record = {}
    rank = distributed.current().rank
    with _noting(found, "batch size"):
        fit_autoencoder(batch_size=9 + rank)
    ae = autoencoder()
    with _noting(found, "data"):
        pvae.fit(ae, rows() + rank, epochs=1, progress=False)
    ae = recipes.ae(D, Q, hidden=(8 + rank,)).double()
    with _noting(found, "widths"):
        pvae.fit(ae, rows(), epochs=1, progress=False)
    return found


class Breaking(nn.Module):
    """Isn't finite for one row, in training."""

    def forward(self, x: Tensor) -> Tensor:
        hit = (x[:, :1] == rows()[13, 0]) & torch.tensor(self.training)
        return torch.where(hit, torch.nan, x)


def infinite(_: Path) -> Record:
    """The second process has the row that breaks the loss, in the third batch."""
    found: Record = {}
    torch.manual_seed(0)
    encoder = nn.Sequential(Breaking(), nn.Linear(D, Q))
    ae = autoencoder()
    pair = VAE(ae.model.prior, ae.model.likelihood, guides.Point(encoder, Q)).double()
    with _noting(found, "error"):
        pvae.fit(pair, rows(), epochs=1, batch_size=9, progress=False)
    found["weights"] = [p.tolist() for p in pair.parameters()]
    return found


def plain(**options: Any) -> pvae.Fit:
    torch.manual_seed(0)
    ae = recipes.ae(D, Q, hidden=(8,)).double()
    settings: Record = {"epochs": 2, "batch_size": 9, "lr": 1e-2, "progress": False, **options}
    return pvae.fit(ae, rows(36), **settings)


def others(folder: Path) -> Record:
    """Compiled steps, and a checkpoint by hand."""
    run = plain(engine="compiled")
    run.save(folder / "saved.safetensors")
    return {"loss": run.history["loss"], "engine": run.training.stepper.engine}


# Killed and restarted


def killed(folder: Path) -> None:
    with distributed.joined("cpu") as world:
        vae, _ = fit_stochastic(folder / "killed")
        save_state(vae, folder / f"killed.{world.rank}.safetensors")


def command(folder: Path, *arguments: str) -> None:
    """The command line, whose second process dies at the end of the second epoch."""
    from pvae.cli import main

    append = History.append

    def append_or_die(self: list[Record], record: Record) -> None:
        if record["epoch"] == 1 and distributed.current().rank == 1:
            _die(folder / "died")
        append(self, record)

    History.append = append_or_die  # type: ignore[method-assign]
    sys.argv = ["pvae", *arguments]
    main()


def endless(folder: Path) -> None:
    """A training that doesn't end by itself; each process notes its number."""
    with distributed.joined("cpu") as world:
        (folder / f"process.{world.rank}").write_text(str(os.getpid()))
        fit_stochastic(folder / "endless", epochs=10**6, engine="eager")


KINDS: dict[str, Callable[..., None]] = {
    "together": together,
    "killed": killed,
    "cli": command,
    "endless": endless,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] != "cli":
        torch.set_default_dtype(torch.float64)
    KINDS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
