"""The history of a training that was killed is that of one that never was, field by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import pvae
from pvae import VAE, corruptions, guides, likelihoods, objectives, penalties, priors, recipes
from pvae.networks import MLP
from tests.fits import D, Q, binary, state
from tests.test_kinds import Regression

pytestmark = pytest.mark.usefixtures("store")


class KilledError(Exception):
    """Stands for a kill: nothing is written after it."""


class Validation(Dataset):
    """Rows that kill the first training in a folder as the second epoch is validated.

    By then the checkpoint of the epoch's last step is written, and its record isn't.
    """

    def __init__(self, folder: Path, rows: Tensor, *, kills: bool) -> None:
        self.folder, self.rows, self.kills = folder, rows, kills

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        file = self.folder / "history.jsonl"
        if self.kills and file.exists() and len(file.read_text().splitlines()) == 1:
            raise KilledError
        return self.rows[index]


class TwoKinds(Regression):
    """A regression with a term in the guide for labelled rows."""

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("regression", self)
        with pyro.plate("data", len(x)):
            loc = self.predict(x)[:, 0]
            if y is None:
                pyro.sample("y", dist.Normal(loc, 1.0))
            else:
                pyro.factor("fit", -(loc - y).square(), has_rsample=True)


def contractive() -> VAE:
    torch.manual_seed(0)
    parts: dict[str, Any] = {"corruption": corruptions.Masking(0.3)}
    return recipes.denoising_ae(D, Q, hidden=(8,), penalties=penalties.Contractive(0.1), **parts)


def plain() -> VAE:
    torch.manual_seed(0)
    return VAE(
        priors.StandardNormal(Q),
        likelihoods.Gaussian(MLP(Q, D, (8,)), D, sigma="optimal"),
        guides.MeanField(MLP(D, 2 * Q, (8,)), Q),
    )


def labelled() -> dict[str, Any]:
    few, many = binary(20), binary(60)
    return {"unlabelled": many, "labelled": (few, few.sum(1))}


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {
    "penalty": (contractive, binary, {}),
    "multiplier": (plain, binary, {"objective": objectives.GECO(tolerance=3.0)}),
    "warm-up": (plain, binary, {"objective": objectives.ELBO(beta=pvae.schedules.Warmup(5))}),
    "rate": (plain, binary, {"lr_schedule": pvae.schedules.Cosine(), "clip_norm": 1.0}),
    "kinds": (TwoKinds, labelled, {}),
    "mix": (TwoKinds, labelled, {"mix": {"labelled": 1, "unlabelled": 2}}),
    "pyro's": (plain, binary, {"objective": pyro.infer.TraceMeanField_ELBO()}),
}


PENALISED = {"penalty", "kinds", "mix"}


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_has_the_history_of_one_that_never_was(name: str, tmp_path: Path) -> None:
    make, data, options = CASES[name]

    def run(folder: Path, *, kills: bool) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        with pyro.get_param_store().scope():
            pair = make()
            pvae.fit(
                (pair.model, pair.guide), data(), epochs=3, batch_size=16, save_steps=1, lr=1e-2,
                folder=folder, resume=True, progress=False, engine="eager",
                valid=Validation(folder, binary(9), kills=kills), **options,
            )  # fmt: skip
        lines = (folder / "history.jsonl").read_text().splitlines()
        records = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
        return records, state(pair)

    whole, expected = run(tmp_path / "whole", kills=False)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", kills=True)
    found, tensors = run(tmp_path / "killed", kills=False)
    assert len(whole) == 3
    assert found == whole
    assert all(torch.equal(tensors[k], expected[k]) for k in expected)
    assert all(("penalty" in record) == (name in PENALISED) for record in found)
