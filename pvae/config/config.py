"""`Config`: the fields, their checks, the pair and the objective that they stand for."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import nn

from pvae import corruptions, guides, likelihoods, objectives, penalties, priors, recipes
from pvae.config.option import Option, field, flag, numbers_of, part_options, recipe_options
from pvae.config.values import check_kinds, values_in
from pvae.data import Limits, Splits, load
from pvae.data.arrays import BINARIZE, Binarize
from pvae.engine import ASKED
from pvae.errors import (
    ArgumentError,
    CheckpointError,
    PvaeError,
    as_shape,
    as_widths,
    check_count,
    check_number,
    check_path,
    quoted,
)
from pvae.fitting import fit
from pvae.networks import activation_named, check_weights
from pvae.objectives import Objective
from pvae.penalties import Penalty
from pvae.schedules import Warmup
from pvae.vae import VAE

__all__ = ["Config", "options"]


def _widths(value: object) -> object:
    if value == "linear":
        return ()
    if isinstance(value, str):
        try:
            return tuple(int(width) for width in value.split(","))
        except ValueError:
            raise ValueError("widths such as 256,256") from None
    return value


Widths = Annotated[tuple[int, ...], BeforeValidator(_widths)]
_data, _pair = partial(field, "Data"), partial(field, "Prior, likelihood and guide")
_network, _objective = partial(field, "Networks"), partial(field, "Objective")
_training = partial(field, "Training")


class Config(BaseModel):
    """What a run is made with; ``None`` where the recipe or the data decide.

    Beside the fields below it takes the numbers of `options` that are none: those of recipes,
    corruptions and penalties.

    Raises:
        ArgumentError: If a name is unknown or a value can't be used.

    Example:
        >>> config = Config(recipe="denoising_ae", noise=0.3, epochs=5)
        >>> config.epochs, config.numbers
        (5, {'noise': 0.3})
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, int | float] = Field(init=False)

    data: str = _data(
        "digits",
        "Name of a data set, or a file (.npy, .npz, IDX), in which images have shape (N, H, W) or "
        "(N, C, H, W). Data sets: digits, mnist, fashion_mnist, kmnist, static_mnist, freyfaces.",
        "images.npy",
    )
    data_dir: str | None = _data(
        None, "Folder that holds the data sets.", "datasets", unset="environment variable PVAE_DATA"
    )
    binarize: str = _data(
        "none",
        "How grey values become 0 or 1: dynamic draws them anew for every batch, static once.",
        "dynamic",
        choices=BINARIZE,
    )
    max_file_bytes: int = _data(
        Limits.max_bytes,
        "Most bytes of the arrays of a data file, unpacked; an .npy file has no such limit.",
        2**33,
    )
    max_file_rows: int = _data(
        Limits.max_rows, "Most rows that an array of a data file may have.", 10**9
    )
    recipe: str = _pair(
        "vae", "Kind of autoencoder; all but vae are deterministic.", "ae", choices=recipes.named
    )
    prior: str | None = _pair(
        None,
        "Prior p(z) of the latent.",
        "laplace",
        choices=priors.named,
        unset="standard_normal for vae and rae, laplace for sparse_ae, flat for the others",
    )
    likelihood: str | None = _pair(
        None,
        "Likelihood p(x | z) of the data.",
        "gaussian",
        choices=likelihoods.named,
        unset="decided by the data: bernoulli for binary ones, binomial for counts, else gaussian",
    )
    sigma: float | str | None = _pair(
        None,
        "Standard deviation of a gaussian likelihood: a number, or how it is learned (shared, "
        "feature, predicted, optimal).",
        "shared",
        unset="optimal; 0.707, the squared error, for deterministic recipes",
    )
    guide: str | None = _pair(
        None,
        "Family of the guide q(z | x).",
        "mean_field",
        choices=guides.named,
        unset="mean_field for vae, a point mass for the others",
    )
    latent_dim: int = _pair(8, "Number of entries of the latent z.", 20)
    network: str = _network(
        "mlp",
        "Kind of encoder and decoder; conv and resnet are for images.",
        "conv",
        choices=recipes.NETWORKS,
    )
    hidden: Widths | None = _network(
        None,
        "Widths of the hidden layers of an mlp, or channels of conv and resnet.",
        "512,256",
        unset="256,256 for an mlp, 32,64 for conv and resnet",
    )
    decoder_hidden: Widths | None = _network(
        None,
        "Widths of the decoder's hidden layers; linear for a decoder without any.",
        "256,512",
        unset="those of the encoder in reverse, or linear for sparse_ae",
    )
    activation: str = _network(
        "ReLU", "Activation of the hidden layers, a class of torch.nn.", "SiLU"
    )
    code_activation: str | None = _network(
        None,
        "Activation at the end of a deterministic encoder, a class of torch.nn; Identity for none.",
        "ReLU",
        unset="ReLU for sparse_ae, none for the others",
    )
    objective: Annotated[str, BeforeValidator(lambda v: str(v).lower())] = _objective(
        "elbo",
        "Name of what training maximises; docs/objectives.md describes each.",
        "dreg",
        choices=objectives.named,
    )
    num_particles: int | None = _objective(
        None, "Number K of draws from the guide for each datum.", 5
    )
    beta: float | None = _objective(
        None, "Weight of the rate KL(q(z | x) || p(z)) in the objective; 1 is the ELBO.", 4.0
    )
    warmup: int = _objective(
        0, "Number of epochs in which the weight of the rate rises from 0.", 10, least=0
    )
    epochs: int = _training(100, "Number of passes over the training data.", 50)
    batch_size: int = _training(64, "Number of data in a batch.", 128)
    lr: float = _training(1e-3, "Learning rate of Adam.", 3e-4, is_positive=True)
    patience: int | None = _training(
        None,
        "Number of epochs without a better validation value after which training stops.",
        10,
        unset="no early stopping",
    )
    engine: str = _training(
        "auto", "How a step is run; auto compiles it where that pays.", "eager", choices=ASKED
    )
    seed: int = _training(
        0, "Seed of the split of data, of the networks' first weights, of draws.", 1, least=0
    )

    def __init__(self, /, **values: object) -> None:
        known = options()
        given = {n: v for n, v in values.items() if v is not None or n in type(self).model_fields}
        for name in given.keys() - known.keys():
            near = [flag(n) for n in difflib.get_close_matches(name, known, 1)]
            raise ArgumentError(flag(name), "an option of pvae train", "an unknown name", near)
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise _in_our_words(error) from None
        for name, option in known.items():
            option.check(name, getattr(self, name, None))
        if isinstance(sigma := self._sigma(), float):
            check_number("--sigma", sigma, above=0)
        as_shape(flag("latent_dim"), self.latent_dim)
        check_count(flag("num_particles"), self.num_particles or 1, 4 * self.latent_dim)
        for name in ("hidden", "decoder_hidden"):
            widths = as_widths(flag(name), getattr(self, name) or ())
            check_weights(flag(name), pairwise([*widths, self.latent_dim]))
        for name in ("activation", "code_activation"):
            if (value := getattr(self, name)) is not None:
                activation_named(value, flag(name))

    @property
    def numbers(self) -> Mapping[str, int | float]:
        """Numbers of recipes, corruptions and penalties that were given."""
        return self.model_extra or {}

    @property
    def limits(self) -> Limits:
        """How large a file's arrays may be."""
        return Limits(self.max_file_bytes, self.max_file_rows)

    def load_data(self, *, fetch: bool = False) -> Splits:
        """The data, scaled as the likelihood wants them."""
        how: Binarize = self.binarize  # type: ignore[assignment]
        splits = load(
            self.data,
            self.data_dir,
            binarize=how,
            seed=self.seed,
            fetch=fetch,
            limits=self.limits,
        )
        if self.likelihood_for(splits) != "gaussian" or splits.levels in (None, 2):
            return splits
        data, scale = (splits.train, splits.valid, splits.test), 1.0 / (splits.levels - 1)
        train, valid, test = (replace(part, scale=scale) for part in data)
        return replace(splits, train=train, valid=valid, test=test)

    def likelihood_for(self, splits: Splits) -> str:
        """The likelihood: as asked for, or the natural one of the data."""
        if self.likelihood is not None:
            return self.likelihood
        if self.has_point or splits.levels is None:
            return "gaussian"
        return "bernoulli" if splits.levels == 2 else "binomial"

    @property
    def has_point(self) -> bool:
        """Whether the guide is a point mass."""
        return self.recipe in recipes.DETERMINISTIC if self.guide is None else self.guide == "point"

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths (or channels) of hidden layers."""
        return self.hidden or ((256, 256) if self.network == "mlp" else (32, 64))

    def build(self, splits: Splits) -> VAE:
        """The pair, untrained."""
        name, levels = self.likelihood_for(splits), splits.levels
        if self.sigma is not None and name != "gaussian":
            fixes = ["--likelihood gaussian"]
            raise ArgumentError("--sigma", "a gaussian likelihood beside it", name, fixes)
        parts: dict[str, object] = {"likelihood": name, "levels": levels, "hidden": self.widths}
        if name == "gaussian":
            parts["likelihood"] = partial(likelihoods.Gaussian, sigma=self._sigma())
        elif levels is not None:
            parts["in_scale"] = 1.0 / (levels - 1)
        asked = ("prior", "guide", "network", "decoder_hidden", "activation", "code_activation")
        parts |= {n: v for n in asked if (v := getattr(self, n)) is not None}
        parts |= self._variations()
        if corruption := self._corruption(splits):
            parts["corruption"] = corruption
        return recipes.named[self.recipe](splits.event_shape, self.latent_dim, **parts)

    def _sigma(self) -> float | str:
        default = 0.5**0.5 if self.has_point else "optimal"
        sigma = default if self.sigma is None else self.sigma
        with contextlib.suppress(ValueError):
            return float(sigma)
        return sigma

    def _variations(self) -> dict[str, object]:
        """The recipe's own numbers, and penalties beside them."""
        own = numbers_of(recipes.named[self.recipe])
        parts: dict[str, object] = {n: v for n, v in self.numbers.items() if n in own}
        others = {n: v for n, v in self.numbers.items() if n not in {*own, *corruptions.named}}
        if self.prior is None and "l1" in others:
            parts["prior"] = partial(priors.Laplace, rate=others.pop("l1"))
        if others:
            parts["penalties"] = [_penalty(n, v, self.recipe) for n, v in others.items()]
        return parts

    def _corruption(self, splits: Splits) -> nn.Module | None:
        """The corruptions in a row, in units of the data as they are scaled."""
        if not (chosen := [n for n in corruptions.named if n in self.numbers]):
            return None
        unit = 1.0
        if splits.levels is None:
            x = splits.train.arrays[0]
            low, high = float(x[:].min()), float(x[:].max())
        else:
            unit = 1.0 if self.likelihood_for(splits) == "gaussian" else splits.levels - 1.0
            low, high = 0.0, unit
        made = (corruptions.named[n].for_range(self.numbers[n], low, high, unit) for n in chosen)
        return nn.Sequential(*made)

    def make_objective(self) -> Objective:
        """What is maximised."""
        beta: float | Warmup | None = self.beta
        if self.warmup:
            beta = Warmup(self.warmup, "epochs", end=1.0 if self.beta is None else self.beta)
        asked = {"num_particles": self.num_particles, "beta": beta}
        given = {name: value for name, value in asked.items() if value is not None}
        takes = {n: inspect.signature(kind).parameters for n, kind in objectives.named.items()}
        for name in given.keys() - takes[self.objective].keys():
            where = flag("warmup" if isinstance(given[name], Warmup) else name)
            expected = f"an option of the objective {self.objective}"
            fixes = [f"--objective {n}" for n, parameters in takes.items() if name in parameters]
            raise ArgumentError(where, expected, f"{name}={given[name]!r}", fixes[:2])
        return objectives.named[self.objective](**given)

    @property
    def fit_options(self) -> dict[str, Any]:
        """The fields that are arguments of `pvae.fit`, by name: a new one needs no more."""
        known = inspect.signature(fit).parameters.keys() - {"data", "objective"}
        return {name: getattr(self, name) for name in type(self).model_fields if name in known}

    @classmethod
    def values_in(cls, path: Path) -> dict[str, object]:
        """What a file gives: ``config.json`` of a run (or the run's folder), JSON or TOML.

        Raises:
            CheckpointError: If the file can't be read or isn't a configuration.
        """
        values = values_in(path / "config.json" if os.path.isdir(path) else path)  # noqa: PTH112
        for name in ("resolved", "job"):  # which say what came of it
            values.pop(name, None)
        return values

    @classmethod
    def read(cls, path: str | Path) -> Config:
        """Reads a configuration from a file or from the folder of a run.

        Raises:
            CheckpointError: If the file isn't a configuration.
        """
        path = check_path("path", path)
        path = path / "config.json" if os.path.isdir(path) else path  # noqa: PTH112
        return cls.of_file(path, cls.values_in(path))

    @classmethod
    def of_file(cls, path: Path, values: dict[str, object]) -> Config:
        """The configuration of values that a file gives.

        Raises:
            CheckpointError: If it is none; names the file, and where in it.
        """
        try:
            check_kinds(values, options())
            return cls(**values)
        except PvaeError as error:
            where = f"{path}, {error.where.removeprefix('--').replace('-', '_')}"
            named = [fix.removeprefix("--").partition(" ") for fix in error.fixes]
            fixes = [f"{name.replace('-', '_')} {value}".strip() for name, _, value in named]
            raise CheckpointError(where, error.expected, error.actual, fixes) from error


def _penalty(name: str, weight: float, recipe: str) -> Penalty:
    """The penalty of that name; another number is refused, as the recipe has none of that name."""
    if name in penalties.named:
        return penalties.named[name](weight)
    actual = f"--recipe {recipe}" + (" with --prior" if name == "l1" else "")
    fixes = [f"--recipe {r}" for r, build in recipes.named.items() if name in numbers_of(build)]
    raise ArgumentError(flag(name), "an option of the recipe", actual, fixes)


def options() -> dict[str, Option]:
    """All options of a training by name, those of parts that have been given a name included.

    Example:
        >>> print(options()["num_codes"].text("num_codes"))
        Number K of code vectors in the codebook (vq_vae only). Default: 64. Example: --num-codes 64
    """
    fields = {name: info.json_schema_extra for name, info in Config.model_fields.items()}
    own = {name: cast("dict[str, Option]", extra)["option"] for name, extra in fields.items()}
    return own | recipe_options() | part_options()


def _in_our_words(error: ValidationError) -> ArgumentError:
    """What pydantic finds wrong, as the house says it."""
    last = error.errors()[-1]  # of an integer or a number, what the number would have to be
    expected = last["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    expected = expected if "widths" in expected else expected.split(", ")[0]
    return ArgumentError(flag(str(last["loc"][0])), expected, quoted(last["input"]))
