"""Run folders: what the command line writes, and how a pair is built again from it.

A run folder holds ``config.json``, ``checkpoint.safetensors``, ``history.jsonl``, ``figures/`` and
``summary.txt``.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pvae import corruptions, fitting, guides, likelihoods, penalties, priors
from pvae.checkpoint import write_atomically
from pvae.data import Data, Splits, load
from pvae.distributed import job
from pvae.engine import ASKED
from pvae.errors import ArgumentError, CheckpointError, PvaeError, TrainingError
from pvae.networks import activation_named
from pvae.objectives import Objective
from pvae.objectives.table import ALL
from pvae.recipes import NETWORKS, RECIPES
from pvae.schedules import Warmup
from pvae.vae import VAE

__all__ = [
    "CORRUPTIONS",
    "GUIDES",
    "LIKELIHOODS",
    "OBJECTIVES",
    "PENALTIES",
    "PRIORS",
    "Config",
    "job_of",
    "open_run",
]

PRIORS: dict[str, Callable[..., Any]] = {
    "standard_normal": priors.StandardNormal,
    "normal": priors.Normal,
    "laplace": priors.Laplace,
    "student_t": priors.StudentT,
    "flat": priors.Flat,
}
CORRUPTIONS: dict[str, Callable[..., Any]] = {
    "noise": corruptions.Noise,
    "mask": corruptions.Masking,
    "salt_and_pepper": corruptions.SaltAndPepper,
    "block": corruptions.BlockMasking,
    "downsample": corruptions.Downsampling,
}
PENALTIES: dict[str, Callable[[float], penalties.Penalty]] = {
    "l1_activations": penalties.Activations,
    "contractive": penalties.Contractive,
    "weight_decay": penalties.WeightDecay,
    "mmd": penalties.MMD,
}
GUIDES: dict[str, Callable[..., Any]] = {"mean_field": guides.MeanField, "point": guides.Point}
OBJECTIVES: dict[str, type[Objective]] = {
    kind.__name__.lower(): kind
    for kind in ALL
    if not any(
        p.default is p.empty and p.kind is not p.VAR_KEYWORD
        for p in inspect.signature(kind).parameters.values()
    )
}
"""Those that need no argument."""
LIKELIHOODS = ("bernoulli", "binomial", "categorical", "gaussian")


@dataclass(frozen=True)
class Config:
    """What a run was made with; ``None`` where the recipe or the data decide."""

    data: str = "digits"
    data_dir: str | None = None
    binarize: str = "none"
    recipe: str = "vae"
    prior: str | None = None
    likelihood: str | None = None
    sigma: str | None = None
    guide: str | None = None
    noise: float | None = None
    mask: float | None = None
    salt_and_pepper: float | None = None
    block: int | None = None
    downsample: int | None = None
    l1: float | None = None
    l1_activations: float | None = None
    contractive: float | None = None
    weight_decay: float | None = None
    mmd: float | None = None
    num_codes: int | None = None
    num_latents: int | None = None
    commitment: float | None = None
    network: str = "mlp"
    hidden: tuple[int, ...] | None = None
    decoder_hidden: tuple[int, ...] | None = None
    activation: str = "ReLU"
    code_activation: str | None = None
    latent_dim: int = 8
    objective: str = "elbo"
    num_particles: int | None = None
    beta: float | None = None
    warmup: int = 0
    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    patience: int | None = None
    engine: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("recipe", self.recipe, RECIPES),
            ("prior", self.prior, PRIORS),
            ("likelihood", self.likelihood, LIKELIHOODS),
            ("guide", self.guide, GUIDES),
            ("network", self.network, NETWORKS),
            ("objective", self.objective, OBJECTIVES),
            ("engine", self.engine, ASKED),
        ):
            if value is not None and value not in known:
                raise ArgumentError(f"--{name}", f"one of {', '.join(known)}", repr(value))
        activation_named(self.activation, "--activation")
        if self.code_activation is not None:
            activation_named(self.code_activation, "--code-activation")

    # Data

    def load_data(self, *, fetch: bool = False) -> Splits:
        """The data, scaled as the likelihood wants them."""
        splits = load(
            self.data,
            self.data_dir,
            binarize=self.binarize,  # type: ignore[arg-type]
            seed=self.seed,
            fetch=fetch,
        )
        if self.likelihood_for(splits) == "gaussian" and splits.levels not in (None, 2):
            scale = 1.0 / (splits.levels - 1)

            def scaled(data: Data) -> Data:
                return replace(data, scale=scale)

            return replace(
                splits,
                train=scaled(splits.train),
                valid=scaled(splits.valid),
                test=scaled(splits.test),
            )
        return splits

    def likelihood_for(self, splits: Splits) -> str:
        """The likelihood: as asked for, or the natural one of the data."""
        if self.likelihood is not None:
            return self.likelihood
        if self.has_point or splits.levels is None:
            return "gaussian"
        return "bernoulli" if splits.levels == 2 else "binomial"

    # The pair

    def build(self, splits: Splits) -> VAE:
        """The pair, untrained."""
        name, levels = self.likelihood_for(splits), splits.levels
        if self.sigma is not None and name != "gaussian":
            raise ArgumentError(
                "--sigma", "a gaussian likelihood beside it", name, ["--likelihood gaussian"]
            )
        options: dict[str, Any] = {
            "likelihood": self._likelihood(name, splits),
            "network": self.network,
            "activation": activation_named(self.activation),
        }
        if levels is not None and name != "gaussian":
            options["in_scale"] = 1.0 / (levels - 1)
        if self.prior is not None:
            options["prior"] = PRIORS[self.prior]
        if self.guide is not None:
            options["guide"] = GUIDES[self.guide]
        if self.decoder_hidden is not None:
            options["decoder_hidden"] = self.decoder_hidden
        if self.code_activation is not None:
            options["code_activation"] = activation_named(self.code_activation)
        return RECIPES[self.recipe].build(
            splits.event_shape,
            self.latent_dim,
            hidden=self.widths,
            **self._variations(splits),
            **options,
        )

    def _variations(self, splits: Splits) -> dict[str, Any]:
        """What makes a variant: the recipe's own arguments, corruptions, penalties."""
        own = _arguments(self.recipe)
        found: dict[str, Any] = {}
        others: list[penalties.Penalty] = []
        for name in ("l1", *PENALTIES, "num_codes", "num_latents", "commitment"):
            value = getattr(self, name)
            if value is None:
                continue
            if name in own:
                found[name] = value
            elif name == "l1_activations" and self.recipe == "sparse_activations_ae":
                found["l1"] = value
            elif name in PENALTIES:
                others.append(PENALTIES[name](value))
            elif name == "l1" and self.prior is None:
                found["prior"] = partial(priors.Laplace, rate=value)
            else:
                option = f"--{name.replace('_', '-')}"
                raise ArgumentError(
                    option,
                    "an option of the recipe",
                    f"--recipe {self.recipe}" + (" with --prior" if name == "l1" else ""),
                    [f"--recipe {r}" for r in RECIPES if name in _arguments(r)][:2],
                )
        if others:
            found["penalties"] = others
        chosen = [(n, getattr(self, n)) for n in CORRUPTIONS if getattr(self, n) is not None]
        if chosen:
            made = [CORRUPTIONS[n](v) for n, v in chosen]
            for part in made:  # which are in units of data from 0 to 1
                if isinstance(part, corruptions.SaltAndPepper) and splits.levels is None:
                    x = splits.train.arrays[0]
                    part.low, part.high = float(x[:].min()), float(x[:].max())
                elif splits.levels is not None and self.likelihood_for(splits) != "gaussian":
                    if isinstance(part, corruptions.SaltAndPepper):
                        part.high = float(splits.levels - 1)
                    if isinstance(part, corruptions.Noise):
                        part.sigma *= splits.levels - 1
            found["corruption"] = nn.Sequential(*made)
        return found

    @property
    def has_point(self) -> bool:
        """Whether the guide is a point mass."""
        if self.guide is not None:
            return self.guide == "point"
        return RECIPES[self.recipe].has_point

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths (or channels) of hidden layers."""
        return self.hidden or ((256, 256) if self.network == "mlp" else (32, 64))

    def _likelihood(self, name: str, splits: Splits) -> Callable[..., Any]:
        if name == "gaussian":
            sigma: float | str = self.sigma or (0.5**0.5 if self.has_point else "optimal")
            with contextlib.suppress(ValueError):
                sigma = float(sigma)
            return partial(likelihoods.Gaussian, sigma=sigma)
        if name == "bernoulli":
            if splits.levels not in (None, 2):
                raise ArgumentError(
                    "--likelihood bernoulli",
                    "binary data",
                    f"data with {splits.levels} levels",
                    ["--binarize dynamic", "--likelihood binomial"],
                )
            return likelihoods.Bernoulli
        if splits.levels is None:
            raise ArgumentError(
                f"--likelihood {name}",
                "data with known levels (bytes, digits, binarised)",
                "real numbers",
                ["--likelihood gaussian"],
            )
        if name == "binomial":
            return partial(likelihoods.Binomial, total_count=splits.levels - 1)
        return partial(likelihoods.Categorical, levels=splits.levels)

    def make_objective(self) -> Objective:
        """What is maximised."""
        kind = OBJECTIVES[self.objective]
        known = inspect.signature(kind).parameters
        options: dict[str, Any] = {}
        if self.num_particles is not None:
            options["num_particles"] = self.num_particles
        if self.beta is not None or self.warmup:
            end = 1.0 if self.beta is None else self.beta
            options["beta"] = Warmup(self.warmup, "epochs", end=end) if self.warmup else end
        for name in options:
            if name not in known:
                option = "--warmup" if name == "beta" and self.warmup else f"--{name}"
                raise ArgumentError(
                    option.replace("_", "-"),
                    f"an option of the objective {self.objective}",
                    f"{name}={options[name]!r}",
                    [
                        f"--objective {n}"
                        for n, k in OBJECTIVES.items()
                        if name in inspect.signature(k).parameters
                    ][:2],
                )
        return kind(**options)

    # The file

    def resolved(self, splits: Splits, vae: VAE) -> dict[str, Any]:
        """What recipe and data have decided where the configuration says ``None``."""
        return {
            "prior": type(vae.model.prior).__name__,
            "likelihood": self.likelihood_for(splits),
            "guide": type(vae.guide.posterior).__name__,
            "corruption": None if vae.guide.corruption is None else str(vae.guide.corruption),
            "penalties": {
                type(p).__name__: float(p.weight)
                for p in (*vae.model.penalties, *vae.guide.penalties)
            },
            "hidden": list(self.widths),
            "event_shape": list(splits.event_shape),
            "levels": splits.levels,
            "rows": [len(splits.train), len(splits.valid), len(splits.test)],
        }

    @contextlib.contextmanager
    def written(self, folder: Path, splits: Splits, vae: VAE) -> Iterator[None]:
        """Writes ``config.json``, and puts things back if the training is refused."""
        existed, path = folder.exists(), folder / "config.json"
        before = path.read_bytes() if path.exists() else None
        content = {**asdict(self), "resolved": self.resolved(splits, vae)}
        if (name := job()) is not None:
            content["job"] = name
        write_atomically(path, f"{json.dumps(content, indent=2)}\n".encode())
        try:
            yield
        except TrainingError:
            raise
        except PvaeError:
            if before is not None:
                write_atomically(path, before)
            else:
                path.unlink()
            if not existed:
                folder.rmdir()
            raise

    @classmethod
    def read(cls, folder: Path) -> Config:
        """Reads ``config.json``.

        Raises:
            CheckpointError: If the folder isn't a run.
        """
        path = folder / "config.json"
        try:
            values = json.loads(path.read_text())
            known = {f.name for f in fields(cls)}
            for name in ("resolved", "job"):
                values.pop(name, None)
            if not isinstance(values, dict) or set(values) - known:
                raise ValueError("other names than those of a run")
            for name in ("hidden", "decoder_hidden"):
                widths = values.get(name)
                values[name] = None if widths is None else tuple(widths)
            return cls(**values)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                str(path),
                "the config.json of a run",
                f"{type(error).__name__}: {error}",
                [
                    "pvae train --out DIR first, then the folder DIR",
                    "of a folder that pvae.fit wrote: fit(..., resume=True).diagnose() in Python",
                ],
            ) from error


def _arguments(recipe: str) -> set[str]:
    return set(inspect.signature(RECIPES[recipe].build).parameters)


def job_of(folder: Path) -> str | None:
    """The job of ``torchrun`` that a run was last trained by; None if there is no run, or no job.

    See `pvae.distributed.job`.
    """
    try:
        name: str | None = json.loads((folder / "config.json").read_text()).get("job")
    except (OSError, ValueError, AttributeError):
        return None
    return name


def open_run(folder: str | Path, device: str = "auto") -> tuple[Config, VAE, Splits]:
    """The configuration, the trained pair (on the device) and the data of a run.

    Raises:
        CheckpointError: If the folder isn't a run, or its files are damaged.
    """
    folder = Path(folder)
    config = Config.read(folder)
    splits = config.load_data()
    vae = config.build(splits)
    fitting.load_parameters(vae, folder)
    vae.place(device)
    return config, vae, splits
