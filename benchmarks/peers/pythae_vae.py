"""pythae's VAE, trained by the ``train_step`` of its own ``BaseTrainer``.

``train_step`` is a pass over ``train_loader``: the model, zero_grad, backward, the step, and the
loss read back. With the option ``"memory"`` the loader is one that yields as many batches of a
tensor as are asked for; with ``"loader"`` they come from pythae's own ``DataLoader``, which
collates single rows. There is no progress bar. The optimiser is its default, Adam, at this
benchmark's rate. The decoder ends in a sigmoid, as pythae's cross-entropy wants; the scale is
exp(log variance / 2), the rate in closed form.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from pythae.data.datasets import BaseDataset  # type: ignore[import-not-found]
from pythae.models import VAE, VAEConfig  # type: ignore[import-not-found]
from pythae.models.base.base_utils import ModelOutput  # type: ignore[import-not-found]
from pythae.models.nn import BaseDecoder, BaseEncoder  # type: ignore[import-not-found]
from pythae.trainers import BaseTrainer, BaseTrainerConfig  # type: ignore[import-not-found]
from pythae.trainers.training_callbacks import (  # type: ignore[import-not-found]
    CallbackHandler,
    TrainingCallback,
)
from torch import Tensor, nn

from peers.common import HIDDEN, LATENT, LR, PIXELS, Case, Side, images

(WIDTH,), SIZE = HIDDEN["mlp"], LATENT["mlp"]


class Encoder(BaseEncoder):
    """Location and logarithm of the variance."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(PIXELS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2 * SIZE))

    def forward(self, x: Tensor) -> Any:
        loc, log_var = self.layers(x).chunk(2, -1)
        return ModelOutput(embedding=loc, log_covariance=log_var)


class Decoder(BaseDecoder):
    """Probabilities of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(SIZE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PIXELS), nn.Sigmoid()
        )

    def forward(self, z: Tensor) -> Any:
        return ModelOutput(reconstruction=self.layers(z))


class Loader:
    """As many batches of a stream as ``steps`` says."""

    def __init__(self, source: Iterator[Any], dataset: Any) -> None:
        self.source, self.dataset, self.steps = source, dataset, 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.source, self.steps)


def from_memory(x: Tensor, batch: int) -> Iterator[dict[str, Tensor]]:
    while True:
        order = torch.randperm(len(x))
        for start in range(0, len(x), batch):
            yield {"data": x[order[start : start + batch]]}


def from_loader(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def make(case: Case, option: str) -> Side:
    torch.set_num_threads(1)
    torch.manual_seed(case.seed)
    x = torch.from_numpy(images(case))
    dataset = BaseDataset(x, torch.zeros(len(x)))
    config = VAEConfig(input_dim=(PIXELS,), latent_dim=SIZE, reconstruction_loss="bce")
    trainer = BaseTrainer(
        VAE(config, Encoder(), Decoder()),
        dataset,
        training_config=BaseTrainerConfig(
            per_device_train_batch_size=case.batch, learning_rate=LR, no_cuda=True
        ),
    )
    trainer.set_optimizer()
    trainer.callback_handler = CallbackHandler([TrainingCallback()], trainer.model)
    source = from_memory(x, case.batch) if option == "memory" else from_loader(trainer.train_loader)
    loader = trainer.train_loader = Loader(source, dataset)

    def run(steps: int) -> float:
        loader.steps = steps
        return float(trainer.train_step(1))

    parameters = sum(p.numel() for p in trainer.model.parameters())
    return Side(run, parameters, ("pythae", "torch"))
