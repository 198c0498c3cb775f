"""Inputs whose meaning would be lost: each is honoured, or refused with a line that works."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
import xarray as xr
from torch import Tensor, nn

import pvae
from pvae import VAE, bounds, diagnostics, fitting, guides, latent, likelihoods, networks, priors
from pvae.data import Data, LinearGaussian, as_source, load
from pvae.errors import ArgumentError, DataError, PairError, PvaeWarning, UndefinedError
from pvae.networks import MLP
from pvae.schedules import Constant, Cosine, Cyclical, Warmup
from tests import linear
from tests.fits import D, binary, same, state, vae

pytestmark = pytest.mark.usefixtures("store")

fit = functools.partial(pvae.fit, progress=False, engine="eager")
nan = math.nan


# Arrays


def masked(hidden: bool) -> np.ma.MaskedArray:
    x = np.ma.masked_array(np.arange(12.0).reshape(4, 3))
    if hidden:
        x[1, 2] = np.ma.masked
    return x


TABLE = pd.DataFrame({"a": pd.array([1, None, 3], dtype="Int64"), "b": [1.0, 2.0, 3.0]})
ARRAYS: dict[str, tuple[Any, str, Any]] = {
    "masked": (masked(hidden=True), "1 of whose 12 entries are missing", lambda x: x.filled(0)),
    "masked, rows": (
        masked(hidden=True),
        "1 of whose 12 entries",
        lambda x: x[~np.ma.getmaskarray(x).any(1)],
    ),
    "SciPy sparse": (
        scipy.sparse.csr_matrix(np.eye(3)),
        r"a SciPy csr_matrix(?s:.*)x\.toarray",
        lambda x: x.toarray(),
    ),
    "SciPy sparse array": (
        scipy.sparse.coo_array(np.eye(3)),
        r"SciPy coo_array",
        lambda x: x.toarray(),
    ),
    "torch sparse": (torch.eye(3).to_sparse(), r"layout sparse_coo", lambda x: x.to_dense()),
    "pandas NA": (
        TABLE,
        r"dtype object(?s:.*)to_numpy\(float, na_value",
        lambda x: x.to_numpy(float, na_value=float("nan"))[[0, 2]],
    ),
    "strings": (
        pd.Series(["b", "a", "b"]),
        r"np\.unique\(x, return_inverse=True\)\[1\]",
        lambda x: np.unique(x, return_inverse=True)[1],
    ),
    "xarray dataset": (
        xr.Dataset({"u": ("n", np.arange(3.0)), "v": ("n", np.arange(3.0))}),
        r"x\['u'\]\.values",
        lambda x: x["u"].values,
    ),
    "generator": ((row for row in [1.0, 2.0]), "a generator, which is read once", lambda x: [1.0]),
    "ragged": ([[1.0, 2.0], [3.0]], "rows of one shape", lambda x: [[1.0, 2.0], [3.0, 0.0]]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_what_means_more_than_an_array_is_refused_with_a_line_that_works(kind: str) -> None:
    thing, words, instead = ARRAYS[kind]
    with pytest.raises(DataError, match=words):
        as_source(thing)
    assert as_source(instead(thing)).num_rows > 0


def test_an_empty_list_is_no_data() -> None:
    with pytest.raises(DataError, match="at least one row; got an empty list"):
        bounds.elbo(vae(), [])


HONOURED: dict[str, Any] = {
    "rows in lists": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0], [9.0, 10.0, 11.0]],
    "masked, nothing hidden": masked(hidden=False),
    "long double": np.arange(12).reshape(4, 3).astype(np.longdouble),
    "half": np.arange(12).reshape(4, 3).astype(np.float16),
    "xarray": xr.DataArray(np.arange(12.0).reshape(4, 3)),
    "pandas": pd.DataFrame(np.arange(12.0).reshape(4, 3)),
    "columns in order": np.asfortranarray(np.arange(12.0).reshape(4, 3)),
}


@pytest.mark.parametrize("kind", HONOURED)
def test_other_kinds_of_array_are_read_as_they_are(kind: str) -> None:
    source = as_source(HONOURED[kind], dtype=torch.float64)
    (x,) = source.rows(torch.arange(4))
    assert x.tolist() == np.arange(12.0).reshape(4, 3).tolist()


def test_lists_of_labels_beside_lists_of_rows() -> None:
    x, y = as_source(([[0.0, 1.0], [1.0, 0.0]], [1, 0])).rows(torch.arange(2))
    assert (tuple(x.shape), y.tolist()) == ((2, 2), [1, 0])


# What a pair does with its arguments


def test_labels_that_no_part_takes_are_said() -> None:
    x, y = binary(40), torch.arange(40) % 10
    with pytest.warns(PvaeWarning, match="Nothing in the pair uses argument 1"):
        fit(vae(), (x, y), epochs=1)
    pair = vae()
    with pytest.raises(ArgumentError, match="neither uses") as error:
        pair.sample(5, torch.arange(5))
    assert pair.sample(5).shape == (5, D)
    assert "sample(5)" in str(error.value)


def conditional() -> VAE:
    torch.manual_seed(0)
    decoder, encoder = MLP(2, D, (8,), context_dim=3), MLP(D, 4, (8,), context_dim=3)
    likelihood = likelihoods.Bernoulli(decoder, D)
    return VAE(priors.StandardNormal(2), likelihood, guides.MeanField(encoder, 2))


def test_labels_that_a_part_takes_are_not() -> None:
    x, y = binary(40), torch.arange(40) % 3
    fit(conditional(), (x, y), epochs=1)
    a, b = (conditional().sample(9, torch.full((9,), k), seed=0, max_rows=4) for k in (0, 1))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("view", [lambda x: x.T, lambda x: x.mT, lambda x: x.data.T])
def test_an_argument_of_which_a_view_is_observed_is_used(view: Any) -> None:
    """Without a warning, and the evidence is that of the rows, log N(0, I + 1 1^T)."""
    x = torch.randn(2, 10)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", x.shape[1]):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            loc = z[..., None] + torch.zeros(2)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=view(x))

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", x.shape[1]):
            pyro.sample("z", dist.Normal(view(x).sum(1) / 3, 3**-0.5))

    pair = pvae.Pair(model, guide, plate="data")
    exact = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1).log_prob(x.T).mean()
    assert bounds.evidence(pair, x, 3, progress=False).mean == pytest.approx(float(exact))


def test_an_argument_that_training_alone_uses_is_used() -> None:
    """A weight of each row on a penalty, which evaluation doesn't see."""

    class Weighted(pvae.Model):
        def forward(self, x: Tensor | None, *context: Tensor, size: int | None = None) -> Tensor:
            if self.training:
                pyro.factor("weight", -context[0].sum() * 0.0)
            return super().forward(x, size=size)

    pair = vae()
    pair.model.__class__ = Weighted
    pair.inspect((binary(40), torch.rand(40)))


class Centring(nn.Module):
    """An encoder that centres its input, and may do so in place."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.layer, self.in_place = nn.Linear(3, 4), in_place

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return self.layer(x.sub_(mean) if self.in_place else x - mean)


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "sub_": lambda: Centring(in_place=True),
    "ReLU": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(3, 4)),
}


def written(kind: str) -> VAE:
    likelihood = likelihoods.Gaussian(nn.Linear(2, 3), 3, sigma=1.0)
    return VAE(priors.StandardNormal(2), likelihood, guides.MeanField(ENCODERS[kind](), 2))


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_guide_that_writes_into_its_data_is_refused(kind: str) -> None:
    """The likelihood would be of what the guide left: log p of centred rows, -10 for -80."""
    pair, x = written(kind), torch.randn(50, 3) + 5
    before = x.clone()
    with pytest.raises(PairError, match=r"guide: .* argument 0 changed in place"):
        fit(pair, x, epochs=1)
    if kind != "dropout":  # which is a matter of training
        for tool in (bounds.elbo, pvae.testing.check_pair):
            with pytest.raises(PairError, match="changed in place"):
                tool(pair, x.clone())
    pair.encode(x)
    pair.reconstruct(x)
    assert torch.equal(x, before)


def test_a_model_that_writes_into_its_data_is_refused() -> None:
    def model(x: Tensor) -> None:
        x.clamp_(min=0.0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    with pytest.raises(PairError, match=r"model: .* argument 0 changed in place"):
        bounds.elbo((model, guide), torch.randn(10))


def by_code(look_up: Callable[[Tensor, Tensor], Tensor]) -> Any:
    weight = torch.randn(3, requires_grad=True)

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(look_up(pyro.param("w", weight), y), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    return model, guide


LOOK_UPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda w, y: w[y],
    "embedding": lambda w, y: nn.functional.embedding(y, w[:, None])[:, 0],
    "one-hot": lambda w, y: nn.functional.one_hot(y, 3).to(w.dtype) @ w,
    "gather": lambda w, y: w.gather(0, y),
    "cast": lambda w, y: w[y.to(torch.int64)],
}


@pytest.mark.parametrize("kind", LOOK_UPS)
def test_a_code_below_zero_is_no_category(kind: str) -> None:
    """pandas codes what is missing as -1, and Python's index then takes the last class."""
    x, y = torch.randn(200), torch.arange(200) % 3
    bounds.elbo(by_code(LOOK_UPS[kind]), (x, y))
    y[150] = -1
    with pytest.raises(DataError, match=r"data\[1\], row 150: expected codes .* got -1"):
        bounds.elbo(by_code(LOOK_UPS[kind]), (x, y))
    rows = y >= 0
    bounds.elbo(by_code(LOOK_UPS[kind]), (x[rows], y[rows]))
    with pytest.raises(DataError, match=r"data\[1\], row 150: expected finite values"):
        bounds.elbo(by_code(LOOK_UPS["index"]), (x, torch.where(rows, y.double(), nan)))


def test_an_integer_that_nothing_is_looked_up_by_may_be_below_zero() -> None:
    x, y = torch.randn(200), torch.arange(200) - 100
    bounds.elbo(by_code(lambda w, y: w[0] * y), (x, y))


# Modes of autograd


def test_training_doesnt_depend_on_the_callers_gradient_mode(device: torch.device) -> None:
    x = binary(40)
    plain, off, inference = vae(), vae(), vae()
    fit(plain, x, epochs=3, batch_size=16)
    with torch.no_grad():
        fit(off, x, epochs=2, batch_size=16).refine(1)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        fit(inference, x.clone(), epochs=3, batch_size=16)
        made = vae().to(device)
        bound = bounds.elbo(inference, x.clone()).mean
    assert same(state(plain), state(off))
    assert same(state(plain), state(inference))
    assert bound == bounds.elbo(plain, x).mean
    with pytest.raises(PairError, match="inference_mode"):
        fit(made, x, epochs=1, device=device)


# Numbers, names, folders


NUMBERS: dict[str, Callable[[], object]] = {
    "threshold": lambda: diagnostics.active_units(vae(), binary(40), threshold=nan),
    "scale": lambda: Data(torch.zeros(4, 2), scale=nan),
    "sigma": lambda: LinearGaussian.random(3, 2, sigma=nan),
    "bin width": lambda: diagnostics.bits_per_dimension(1.0, 2, bin_width=nan),
    "bin width 0": lambda: diagnostics.bits_per_dimension(1.0, 2, bin_width=0.0),
    "in_scale": lambda: networks.MLP(2, 4, in_scale=nan),
    "constant": lambda: Constant(nan),
    "warm-up": lambda: Warmup(10, end=nan),
    "cosine": lambda: Cosine(start=nan),
    "cyclical": lambda: Cyclical(end=math.inf),
    "lr_schedule": lambda: fit(vae(), binary(40), lr_schedule=-1.0),  # type: ignore[arg-type]
    "falling below 0": lambda: fit(vae(), binary(40), lr_schedule=Cosine(end=-1.0)),
    "lr of a group": lambda: fit(vae(), binary(40), optimizer=with_lr(-1.0)),
    "NaN of a group": lambda: fit(vae(), binary(40), optimizer=with_lr(nan)),
    "checks": lambda: pvae.diagnose(vae(), binary(40), checks=[]),
    "folder": lambda: fit(vae(), binary(40), epochs=1, folder=""),
    "blank folder": lambda: fit(vae(), binary(40), epochs=1, folder=" "),
    "save": lambda: fit(vae(), binary(40), epochs=1).save(""),
    "load": lambda: fitting.load_parameters(vae(), ""),
    "data_dir": lambda: load("mnist", data_dir=""),
}


def with_lr(lr: float) -> Any:
    def optimizer(parameters: Any, lr_given: float = 0.1, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [*parameters], "lr": lr}], options.get("lr", lr_given))

    return optimizer


@pytest.mark.parametrize("kind", NUMBERS)
def test_what_is_no_number_name_or_folder_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError):
        NUMBERS[kind]()
    assert not [*tmp_path.iterdir()]


def test_a_learning_rate_below_zero_names_its_step() -> None:
    with pytest.raises(ArgumentError, match=r"lr_schedule at step \d+: .* at least 0; got -"):
        fit(vae(), binary(40), epochs=10, lr_schedule=Warmup(end=-2.0, start=1.0))


def test_a_divergence_that_is_no_number_is_refused() -> None:
    odd = dist.Normal(torch.tensor([0.0, nan]), 1.0, validate_args=False)
    for q, p in ((odd, dist.Normal(0.0, 1.0)), (dist.Normal(0.0, 1.0), odd)):
        with pytest.raises(UndefinedError, match="no number"):
            pvae.kl(q, p)


def test_one_code_has_no_density() -> None:
    for kind in ("gaussian", "gmm"):
        with pytest.raises(DataError, match="at least two"):
            latent.fit_density(torch.randn(1, 2), kind, num_components=1)
    toy = LinearGaussian.random(5, 2)
    pair = linear.pair(toy, linear.exact)
    with pytest.raises(DataError, match="at least two"):
        latent.fit_density(latent.codes(pair, toy.sample(1)))
