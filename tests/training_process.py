"""A training in a process of its own, which a test kills: python training_process.py FOLDER KIND.

Prints the number of each step as it starts, so that the test can choose its moment, and at the
end writes the pair's state to FOLDER/final.safetensors.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pvae
from pvae import VAE, data, guides, likelihoods, priors, schedules
from pvae.networks import MLP
from pvae.objectives import ELBO

D, Q, N = 6, 2, 90


class Slow(pvae.Guide):
    """Announces each training step and waits, so that there is a moment to be killed in."""

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        if self.training:
            print("step", flush=True)
            time.sleep(0.02)
        return super().forward(x, *context)


def build() -> VAE:
    """Batch norm, dropout and an optimal sigma: everything that keeps state of its own."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 4))
    pair = VAE(
        priors.Normal(Q),
        likelihoods.Gaussian(MLP(Q, D, (8,)), D, sigma="optimal"),
        guides.MeanField(encoder, Q),
    )
    pair.guide.__class__ = Slow
    return pair


def load(folder: Path, kind: str) -> Any:
    x = np.random.default_rng(0).random((N, D), dtype=np.float32)
    if kind == "memmap":
        path = folder.parent / "x.npy"
        if not path.exists():
            np.save(path, x)
        return np.load(path, mmap_mode="r")
    if kind == "dynamic":
        return data.Data((x,), binarize="dynamic")
    return {
        "array": x,
        "tensor": torch.from_numpy(x),
        "dataset": TensorDataset(torch.from_numpy(x)),
    }[kind]


def main(folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    pair = build()
    x = load(folder, kind)
    run = pvae.fit(
        pair,
        x,
        ELBO(beta=schedules.Warmup(4, "epochs")),
        epochs=7,
        batch_size=20,
        lr=1e-2,
        lr_schedule=schedules.Cosine(),
        clip_norm=5.0,
        valid=x,
        patience=50,
        folder=folder,
        resume=True,
        save_steps=3,
        progress=False,
    )
    best = {k.replace(".", "_"): v.clone() for k, v in run.progress.best_tensors.items()}
    save_file({**pair.state_dict(), **best}, folder / "final.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
