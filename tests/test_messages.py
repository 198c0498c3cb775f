"""Wrong inputs and the messages they get: where, expected, actual, what to try.

Each row is a call that can't work. The message has to name the place, say what was expected and
what was there, and (where there is something to try) offer it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae import VAE, bounds, data, diagnostics, guides, likelihoods, priors, recipes, schedules
from pvae.errors import PvaeError
from pvae.networks import MLP, ConvEncoder
from pvae.objectives import ELBO

D, Q, N = 6, 2, 20


def vae(**options: Any) -> VAE:
    return recipes.vae(D, Q, hidden=(8,), **options)


def binary(*shape: int) -> Tensor:
    return torch.rand(*(shape or (N, D)), generator=torch.Generator().manual_seed(0)).round()


def fit(pair: Any, x: Any, **options: Any) -> Any:
    return pvae.fit(pair, x, progress=False, epochs=1, **options)


def with_nan() -> Tensor:
    x = binary()
    x[13, 2] = float("nan")
    return x


def wrong_decoder() -> Any:
    pair = VAE(
        priors.StandardNormal(Q),
        likelihoods.Bernoulli(MLP(Q, D + 1), D),
        guides.MeanField(MLP(D, 2 * Q), Q),
    )
    return fit(pair, binary())


def wrong_latent() -> Any:
    pair = VAE(
        priors.StandardNormal(Q + 1),
        likelihoods.Bernoulli(MLP(Q + 1, D), D),
        guides.MeanField(MLP(D, 2 * Q), Q),
    )
    return fit(pair, binary())


def missing_site() -> Any:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("latent", dist.Normal(torch.zeros(Q), 1.0).to_event(1))

    return pvae.fit((model, vae().guide), binary(), progress=False)


def missing_to_event() -> Any:
    pair = vae()
    pair.model.prior = pvae.conditional.as_conditional(
        lambda: dist.Normal(torch.zeros(Q), torch.ones(Q))
    )
    return fit(pair, binary())


def batch_norm_with_one_row() -> Any:
    pair = VAE(
        priors.StandardNormal(Q),
        likelihoods.Bernoulli(MLP(Q, D), D),
        guides.MeanField(nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, 2 * Q)), Q),
    )
    return fit(pair, binary(21, D), batch_size=20)


def nothing_to_train() -> Any:
    pair = vae()
    pair.requires_grad_(requires_grad=False)
    return fit(pair, binary())


def other_folder(tmp_path: Path) -> Any:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"something")
    return fit(vae(), binary(), folder=tmp_path)


Call = Callable[[], Any]

MESSAGES: dict[str, tuple[Call, str, str, str | None]] = {
    # what: (call, where, expected ... got, fix)
    "NaN": (
        lambda: fit(vae(), with_nan()),
        "data, row 13",
        "finite values; got nan (1 such value(s) in this row)",
        "drop the row",
    ),
    "NaN in validation": (
        lambda: fit(vae(), binary(), valid=with_nan()),
        "valid, row 13",
        "finite values; got nan",
        "drop the row",
    ),
    "infinite": (
        lambda: fit(vae(), torch.full((N, D), float("inf"))),
        "data, row 0",
        "finite values; got inf (6 such",
        "drop the row",
    ),
    "grey for Bernoulli": (
        lambda: fit(vae(), torch.full((N, D), 0.5)),
        "data, row 0",
        "values in the support of site 'x', Boolean(); got 0.5",
        "grey_values=True",
    ),
    "bytes for Bernoulli": (
        lambda: fit(vae(), np.full((N, D), 255, dtype=np.uint8)),
        "data, row 0",
        "Boolean(); got 255",
        "Binomial(total_count=255)",
    ),
    "more than total_count": (
        lambda: fit(
            vae(likelihood=functools.partial(likelihoods.Binomial, total_count=3)), 4 * binary()
        ),
        "data, row 0",
        "IntegerInterval(lower_bound=0, upper_bound=3.0); got 4",
        "total_count or levels",
    ),
    "negative for grey Bernoulli": (
        lambda: fit(
            vae(likelihood=functools.partial(likelihoods.Bernoulli, grey_values=True)),
            -0.5 - binary(),
        ),
        "data, row 0",
        "Interval(lower_bound=0.0, upper_bound=1.0); got -",
        None,
    ),
    "wrong features": (
        lambda: fit(vae(), binary(N, D + 1)),
        "MLP",
        "input of shape (..., 6); got (20, 7)",
        "reshape",
    ),
    "images for a vector likelihood": (
        lambda: fit(
            VAE(
                priors.StandardNormal(Q),
                likelihoods.Bernoulli(MLP(Q, D), D),
                guides.MeanField(MLP((2, 3), 2 * Q), Q),
            ),
            binary(N, 2, 3),
        ),
        "data at site 'x'",
        "shape (N, 6), as the likelihood's event_shape says; got (20, 2, 3)",
        "x.reshape(-1, 6)",
    ),
    "empty": (lambda: fit(vae(), binary(0, D)), "data", "at least one row; got no rows", "path"),
    "unequal lengths": (
        lambda: fit(vae(num_classes=3), (binary(), torch.zeros(N - 1, dtype=torch.int64))),
        "data[1]",
        "20 rows, like data[0]; got 19 rows",
        None,
    ),
    "text": (
        lambda: fit(vae(), np.array(["a"] * N)),
        "data",
        "real numbers; got dtype <U1",
        "np.unique(x, return_inverse=True)[1]",
    ),
    "complex": (
        lambda: fit(vae(), binary().to(torch.complex64)),
        "data",
        "real numbers; got dtype torch.complex64",
        None,
    ),
    "labels missing": (
        lambda: fit(vae(num_classes=3), binary()),
        "network",
        "a context of 3 feature(s) or classes",
        "pass the labels: model(x, y), guide(x, y)",
    ),
    "latent_dim 0": (
        lambda: recipes.vae(D, 0),
        "latent_dim",
        "an integer of at least 1; got 0",
        None,
    ),
    "latent_dim 2.5": (lambda: recipes.vae(D, 2.5), "latent_dim", "an integer", None),  # type: ignore[arg-type]
    "event_shape -1": (lambda: recipes.vae((28, -1), 2), "event_shape", "at least 1; got -1", None),
    "no such network": (
        lambda: recipes.vae(D, 2, network="transformer"),
        "network",
        "'mlp', 'conv' or 'resnet'; got 'transformer'",
        None,
    ),
    "conv for vectors": (
        lambda: ConvEncoder(D, 2),
        "ConvEncoder.in_shape",
        "an image shape (channels, height, width); got (6,)",
        "MLP",
    ),
    "decoder's size": (
        wrong_decoder,
        "Bernoulli.network",
        "1 parameter(s) for each value of event_shape (6,), that is (..., 6)",
        "give the network 6 outputs",
    ),
    "prior's size": (
        wrong_latent,
        "site 'z'",
        "a latent of shape (3,), as the prior's event_shape says; got one of shape (20, 2)",
        "the same latent_dim",
    ),
    "site missing in the guide": (
        missing_site,
        "site 'latent'",
        "a site of that name in the guide; got the guide's sites: 'z'",
        "pyro.sample('latent', ...) in the guide",
    ),
    "event dimension missing": (
        missing_to_event,
        "prior at site 'z'",
        "batch_shape (); got batch_shape (2,), event_shape ()",
        ".to_event(1)",
    ),
    "batch norm with one row": (
        batch_norm_with_one_row,
        "batch_size",
        "every batch with at least two rows",
        "batch_size=21",
    ),
    "nothing to train": (
        nothing_to_train,
        "pair",
        "at least one trainable parameter",
        "pyro.param",
    ),
    "batch_size 0": (
        lambda: fit(vae(), binary(), batch_size=0),
        "batch_size",
        "an integer of at least 1; got 0",
        None,
    ),
    "lr -1": (
        lambda: fit(vae(), binary(), lr=-1.0),
        "lr",
        "a finite number above 0; got -1.0",
        None,
    ),
    "no such device": (
        lambda: fit(vae(), binary(), device="gpu"),
        "device",
        "'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'; got 'gpu'",
        "device='auto'",
    ),
    "objective's class": (
        lambda: pvae.fit(vae(), binary(), ELBO, progress=False),
        "objective",
        "an instance of one of pyro.infer's ELBOs",
        "objectives.ELBO(beta=0.5)",
    ),
    "optimiser by name": (
        lambda: fit(vae(), binary(), optimizer="adam"),
        "optimizer",
        "a torch optimiser class",
        "torch.optim.Adam",
    ),
    "patience without validation": (
        lambda: fit(vae(), binary(), patience=3),
        "patience",
        "validation data to look at; got valid=None",
        "valid=x_valid",
    ),
    "sampling a flat prior": (
        lambda: recipes.ae(D, Q).sample(3),
        "priors.Flat",
        "a proper prior to draw z from",
        "fit an ex-post density",
    ),
    "evidence of an autoencoder": (
        lambda: bounds.evidence(recipes.ae(D, Q), binary()),
        "evidence",
        "a guide with a density; got a point mass (Delta) at site 'z'",
        "a stochastic guide",
    ),
    "free sigma with a point": (
        lambda: recipes.ae(D, Q, likelihood=likelihoods.Gaussian),
        "VAE with a point-mass guide",
        "a likelihood with a fixed scale",
        "the squared error",
    ),
    "no such sigma": (
        lambda: likelihoods.Gaussian(MLP(Q, D), D, sigma="best"),
        "Gaussian.sigma",
        "a positive number or one of shared, feature, predicted, optimal; got 'best'",
        None,
    ),
    "class for a prior": (
        lambda: VAE(priors.StandardNormal, likelihoods.Bernoulli(MLP(Q, D), D), vae().guide),
        "prior",
        "a Conditional, a Pyro distribution",
        "an instance",
    ),
    "num_particles 0": (
        lambda: bounds.elbo(vae(), binary(), 0),
        "num_particles",
        "an integer of at least 1; got 0",
        None,
    ),
    "warm-up of no length": (
        lambda: schedules.Warmup(0),
        "Warmup.length",
        "an integer of at least 1; got 0",
        None,
    ),
    "beta not a number": (
        lambda: ELBO(beta=float("nan")),
        "beta",
        "a finite number of at least 0; got nan",
        None,
    ),
    "no such data set": (
        lambda: data.load("mnits"),
        "data",
        "one of digits, mnist",
        None,
    ),
    "no such binarisation": (
        lambda: data.load("digits", binarize="always"),  # type: ignore[arg-type]
        "binarize",
        "'none', 'threshold', 'static' or 'dynamic'; got 'always'",
        None,
    ),
    "which latent": (
        lambda: diagnostics.active_units(two_latents(), torch.zeros(N, D)),
        "active_units",
        "site=NAME, as there isn't exactly one latent of the data; got 'a' and 'b'",
        "site='a'",
    ),
}


def two_latents() -> tuple[Any, Any]:
    def program(x: Tensor, *, observe: bool) -> None:
        with pyro.plate("data", len(x)):
            for name in "ab":
                pyro.sample(name, dist.Normal(x.new_zeros(()) if observe else x[:, 0], 1.0))
            if observe:
                pyro.sample("x", dist.Normal(x.new_zeros(D), 1.0).to_event(1), obs=x)

    return functools.partial(program, observe=True), functools.partial(program, observe=False)


@pytest.mark.parametrize("what", MESSAGES)
def test_messages(what: str) -> None:
    call, where, content, fix = MESSAGES[what]
    with pytest.raises(PvaeError) as error:
        call()
    message, found = str(error.value), error.value
    first = message.splitlines()[0]
    assert first.startswith(f"{where}: expected "), message
    assert content in message.replace("\n", " "), message
    assert found.expected
    if fix is not None:
        assert any(fix in f for f in found.fixes), message
    assert "\n" not in found.one_line()


def test_there_are_enough_rows() -> None:
    assert len(MESSAGES) >= 25


def test_nothing_is_overwritten_before_the_message(tmp_path: Path) -> None:
    with pytest.raises(PvaeError, match="a folder without a training in it"):
        other_folder(tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == b"something"
    with pytest.raises(PvaeError):
        fit(vae(), with_nan(), folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()
