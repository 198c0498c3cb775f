"""fit: what stops a training, what is refused before one, what is warned about."""

from __future__ import annotations

import functools
import itertools
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ReweightedWakeSleep
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae import VAE, checkpoint, data, guides, likelihoods, priors, randomness, schedules
from pvae.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    PairError,
    PvaeWarning,
    TrainingError,
)
from pvae.networks import MLP
from pvae.objectives import ELBO
from tests import pairs, pretend
from tests.fits import D, N, Q, binary, fit, same, state, vae


def normed() -> VAE:
    torch.manual_seed(0)
    return VAE(
        priors.StandardNormal(Q),
        likelihoods.Bernoulli(MLP(Q, D, (8,)), D),
        guides.MeanField(nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, 2 * Q)), Q),
    )


def does_at(step: int, act: Callable[[Tensor], Tensor]) -> type[pvae.Guide]:
    """A guide that does something to its data at one training step (counted from 0)."""

    class Acting(pvae.Guide):
        steps = itertools.count()

        def forward(self, x: Tensor, *context: Tensor) -> Tensor:
            if self.training and next(self.steps) == step:
                x = act(x)
            return super().forward(x, *context)

    return Acting


def poison(x: Tensor) -> Tensor:
    return x * float("nan")


def as_long_as(file: Path, act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Does something as long as a file is there: what goes on without it is of the same code."""
    return lambda x: act(x) if file.exists() else x


def press_ctrl_c(x: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGINT)
    return x


# A value that isn't finite


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.RMSprop], ids=["fused", "not fused"]
)
def test_a_nan_stops_training_in_the_state_before_it(optimizer: Any, device: torch.device) -> None:
    """NaN in mid-epoch: the error names epoch, batch and site; parameters, optimiser and batch
    norm's running statistics are those of a training that ended just before that step."""
    pair, good = normed(), normed()
    pair.guide.__class__ = does_at(7, poison)
    options = {"optimizer": optimizer, "batch_size": 8, "device": device}
    with pytest.raises(TrainingError) as error, pyro.validation_enabled(is_validate=False):
        fit(pair, binary(), epochs=5, **options)
    message = str(error.value)
    assert message.startswith("epoch 1, batch 2: expected a finite loss")
    assert "site 'z' and 'x'" in message
    good.guide.__class__ = does_at(6, press_ctrl_c)
    run = fit(good, binary(), epochs=5, **options)
    assert run.interrupted
    assert run.progress.global_step == 7
    assert same(state(pair), state(good))


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.RMSprop], ids=["fused", "not fused"]
)
def test_training_goes_on_after_a_failure(
    optimizer: Any, tmp_path: Path, device: torch.device
) -> None:
    """The last checkpoint is of before it; with the cause gone, the end is as if it hadn't been."""
    pair, whole = normed(), normed()
    cause = tmp_path / "cause"
    cause.touch()
    pair.guide.__class__ = does_at(7, as_long_as(cause, poison))
    options = {"optimizer": optimizer, "batch_size": 8, "device": device, "save_steps": 3}
    fit(whole, binary(), epochs=3, **options)
    with pytest.raises(TrainingError), pyro.validation_enabled(is_validate=False):
        fit(pair, binary(), epochs=3, folder=tmp_path, **options)
    again = normed()
    again.guide.__class__ = does_at(7, as_long_as(cause, poison))
    cause.unlink()
    run = fit(again, binary(), epochs=3, folder=tmp_path, resume=True, **options)
    assert run.history["step"] == [5, 10, 15]
    assert same(state(again), state(whole))


def test_averages_count_no_failed_step(device: torch.device) -> None:
    run = fit(vae(), binary(), epochs=1, device=device)
    stepper: Any = run.training.stepper
    batch: Any = next(run.training.batches.epoch(0))
    stepper(batch, 3)
    before = stepper.averages()
    with pyro.validation_enabled(is_validate=False):
        stepper((batch[0] * float("nan"),), 4)
        stepper(batch, 5)
    assert stepper.averages() == before
    assert math.isfinite(before["loss"])
    failure = stepper.look()
    assert failure is not None
    assert failure.step == 4
    assert "x" in failure.sites
    stepper.recover(4)
    stepper(batch, 4)
    assert stepper.look() is None
    assert stepper.averages() != before


def test_a_bad_gradient_names_parameters(device: torch.device) -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * float("inf")

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLP(Q, D, (8,))

        def forward(self, z: Tensor) -> Tensor:
            return Bad.apply(self.net(z))

    pair = VAE(
        priors.StandardNormal(Q),
        likelihoods.Bernoulli(Broken(), D),
        guides.MeanField(MLP(D, 2 * Q, (8,)), Q),
    )
    before = state(pair)
    with pytest.raises(TrainingError, match=r"gradient that isn't finite, of 'model\.likelihood"):
        fit(pair, binary(), epochs=2, device=device)
    assert same({k: v.cpu() for k, v in state(pair).items()}, before)


# Ctrl-C


def test_ctrl_c_stops_at_a_steps_end_and_fit_goes_on(device: torch.device) -> None:
    pair, whole = vae(), vae()
    fit(whole, binary(), epochs=4, device=device)
    pair.guide.__class__ = does_at(4, press_ctrl_c)
    before = signal.getsignal(signal.SIGINT)
    run = fit(pair, binary(), epochs=4, device=device)
    assert run.interrupted
    assert run.progress.global_step == 5
    assert signal.getsignal(signal.SIGINT) is before
    run.refine(3)
    assert not run.interrupted
    assert same(state(pair), state(whole))


def test_a_loaders_epoch_is_finished_after_ctrl_c(device: torch.device) -> None:
    pair = vae()
    pair.guide.__class__ = does_at(4, press_ctrl_c)
    loader = DataLoader(TensorDataset(binary()), batch_size=16, shuffle=True)
    run = fit(pair, loader, epochs=4, device=device)
    assert run.interrupted
    run.refine(3)
    assert run.history["epoch"] == [0, 1, 2, 3]


# Signals of a scheduler


def sends(number: int) -> Callable[[Tensor], Tensor]:
    def send(x: Tensor) -> Tensor:
        os.kill(os.getpid(), number)
        return x

    return send


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_ends_the_program_after_a_checkpoint(
    name: str, tmp_path: Path, device: torch.device
) -> None:
    """Sent in mid-epoch; what goes on from the checkpoint ends as if nothing had been."""
    number = getattr(signal, name)
    pair, again, whole = vae(), vae(), vae()
    fit(whole, binary(), epochs=4, device=device)
    cause = tmp_path / "cause"
    cause.touch()
    pair.guide.__class__ = again.guide.__class__ = does_at(4, as_long_as(cause, sends(number)))
    before = signal.getsignal(number)
    with (
        pytest.raises(SystemExit) as ended,
        pytest.warns(
            PvaeWarning, match=f"{name}: the training ends here. It is saved in .*resume=True"
        ),
    ):
        fit(pair, binary(), epochs=4, folder=tmp_path, device=device)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before
    cause.unlink()
    fit(again, binary(), epochs=4, folder=tmp_path, resume=True, device=device)
    assert same(state(again), state(whole))


class Sending(TensorDataset):
    """Sends a signal when it is read in the last validation."""

    is_over = False

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if self.is_over:
            self.is_over = False
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_a_signal_after_the_last_step_is_no_less_delivered(
    tmp_path: Path, device: torch.device
) -> None:
    """The training is whole, and saved; and the program ends, as it was asked to."""
    pair, whole, valid = vae(), vae(), Sending(binary(8))
    fit(whole, binary(), epochs=2, device=device)

    def let_go(x: Tensor) -> Tensor:
        valid.is_over = True
        return x

    pair.guide.__class__ = does_at(5, let_go)  # in the last epoch, of 3 steps
    with pytest.raises(SystemExit), pytest.warns(PvaeWarning, match="SIGTERM: the training ends"):
        fit(pair, binary(), epochs=2, folder=tmp_path, valid=DataLoader(valid), device=device)
    saved = checkpoint.load(tmp_path / "checkpoint.safetensors")
    assert saved.meta["progress"]["epoch"] == 2
    assert same(state(pair), state(whole))


def test_without_a_folder_a_signal_says_that_nothing_is_saved(device: torch.device) -> None:
    pair = vae()
    pair.guide.__class__ = does_at(4, sends(signal.SIGTERM))
    with pytest.raises(SystemExit), pytest.warns(PvaeWarning, match="Nothing is saved"):
        fit(pair, binary(), epochs=4, device=device)


def test_a_handler_that_was_there_is_called_after_the_checkpoint_and_training_goes_on(
    tmp_path: Path, device: torch.device
) -> None:
    pair, whole, steps = vae(), vae(), []
    fit(whole, binary(), epochs=4, device=device)

    def handle(number: int, frame: object) -> None:
        saved = checkpoint.load(tmp_path / "checkpoint.safetensors")
        steps.append(saved.meta["progress"]["global_step"])

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        pair.guide.__class__ = does_at(4, sends(signal.SIGUSR1))
        run = fit(pair, binary(), epochs=4, folder=tmp_path, device=device)
        assert signal.getsignal(signal.SIGUSR1) is handle
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert steps == [5]
    assert not run.interrupted
    assert same(state(pair), state(whole))


def test_a_signal_that_is_ignored_stays_so(device: torch.device) -> None:
    pair = vae()
    pair.guide.__class__ = does_at(4, sends(signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        run = fit(pair, binary(), epochs=4, device=device)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(run.history) == 4


# The best epoch


def test_the_best_epoch_comes_back_when_training_ends_not_when_it_is_interrupted(
    device: torch.device,
) -> None:
    pair = vae()
    few, other = binary(16), binary(17)[:8]
    pair.guide.__class__ = does_at(150, press_ctrl_c)
    options: dict[str, Any] = {"lr": 3e-2, "valid": other, "device": device}
    run = fit(pair, few, epochs=200, patience=200, **options)
    assert run.interrupted
    assert run.progress.best_epoch is not None
    assert run.progress.best_epoch < 140
    last = run.history[-1]["valid_elbo"]
    assert run.progress.best is not None

    def value() -> float:
        return pvae.bounds.elbo(pair, other, seed=0).mean

    assert value() == pytest.approx(last)
    run.refine(1)
    assert value() == pytest.approx(run.progress.best)
    assert value() > last


def test_threads_can_fit(device: torch.device) -> None:
    """Signals can only be handled in the main thread; elsewhere fit goes without."""
    pair = vae()
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(fit(pair, binary(), epochs=1, device=device))
    )
    thread.start()
    thread.join()
    assert len(results[0].history) == 1


def test_bad_rows_are_named_before_training(device: torch.device) -> None:
    pair = vae()
    before = state(pair)
    x = binary()
    x[17, 3] = float("nan")
    with pytest.raises(DataError, match=r"data, row 17: expected finite values"):
        fit(pair, x, device=device)
    with pytest.raises(DataError, match=r"valid, row 17"):
        fit(pair, binary(), valid=x, device=device)
    assert same({k: v.cpu() for k, v in state(pair).items()}, before)


def test_batch_norm_needs_two_rows(device: torch.device) -> None:
    encoder = nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, 2 * Q))
    pair = VAE(
        priors.StandardNormal(Q),
        likelihoods.Bernoulli(MLP(Q, D, (8,)), D),
        guides.MeanField(encoder, Q),
    )
    with pytest.raises(ArgumentError, match="a single row"):
        fit(pair, binary(33), device=device)


def test_no_epoch_changes_nothing(device: torch.device) -> None:
    pair = vae()
    before = state(pair)
    run = fit(pair, binary(), epochs=0, device=device)
    assert same({k: v.cpu() for k, v in state(pair).items()}, before)
    assert len(run.history) == 0


def test_a_loaders_last_batch_isnt_tried(device: torch.device) -> None:
    """Its batches are its own, and trying them would take them."""
    pair = normed()
    loader = DataLoader(TensorDataset(binary(33)), batch_size=16, drop_last=True)
    run = fit(pair, loader, epochs=2, device=device)
    assert run.history["step"] == [2, 4]


# Pairs that batches would wrong


def rows_of_their_own(device: torch.device) -> tuple[Any, Any, Tensor]:
    """z_i ~ N(0, 1), y_i ~ N(z_i, 1), and an autoguide with a location for each row."""
    y = torch.linspace(-2.0, 2.0, N, device=device)

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), y.new_ones(())))
            pyro.sample("y", dist.Normal(z, y.new_ones(())), obs=y)

    guide = AutoNormal(model)
    guide(y)
    return model, guide, y


@pytest.mark.usefixtures("store")
def test_parameters_of_single_rows_stay_with_their_rows(device: torch.device) -> None:
    """The posterior is N(y/2, 1/2), row by row: in one batch, rows aren't shuffled."""
    model, guide, y = rows_of_their_own(device)
    pvae.fit(
        (model, guide),
        y,
        pvae.objectives.ELBO(num_particles=20),
        epochs=300,
        batch_size=None,
        lr=5e-2,
        lr_schedule=schedules.Cosine(),
        progress=False,
        device=device,
    )
    torch.testing.assert_close(guide.median(y)["z"], y / 2, atol=0.1, rtol=0)
    for rows in (None, 40, 16):  # an autoguide not set up yet; set up on so many rows
        pyro.get_param_store().clear()
        guide = AutoNormal(model)
        if rows is not None:
            guide(y[:rows])
        with pytest.raises(PairError, match=r"all 40 rows in one batch(.|\n)*batch_size=None"):
            fit((model, guide), y, device=device)


@pytest.mark.usefixtures("store")
def test_a_pair_of_one_batch_size_is_warned_about_or_refused(device: torch.device) -> None:
    """A model may say torch.zeros(16, Q): that runs on batches of 16 alone."""
    decoder, encoder = nn.Linear(Q, D).to(device), nn.Linear(D, 2 * Q).to(device)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", 16):
            z = pyro.sample("z", dist.Normal(x.new_zeros(16, Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", 16):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    x = pairs.data(48, device)
    with pytest.warns(PvaeWarning, match="runs on batches of 16 rows and on no others"):
        fit((model, guide), x, epochs=1, device=device)
    with pytest.raises(PairError, match="all 40 rows in one batch"):
        fit((model, guide), x[:40], epochs=1, device=device)


def with_a_global_site(device: torch.device, *, latent: bool) -> tuple[Any, Any]:
    """A site outside a plate that doesn't know how many data there are."""
    decoder, encoder = nn.Linear(Q, D).to(device), nn.Linear(D, 2 * Q).to(device)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, x: Tensor) -> None:
            shift: Any = 0.0
            if latent:
                shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), x.new_ones(())))
            else:
                pyro.factor("ridge", -self.decoder.weight.square().sum())
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(Q), x.new_ones(Q)).to_event(1))
                loc = self.decoder(z) + shift
                pyro.sample("x", dist.Normal(loc, x.new_tensor(1.0)).to_event(1), obs=x)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.shift = encoder, nn.Parameter(torch.zeros((), device=device))

        def forward(self, x: Tensor) -> None:
            if latent:
                pyro.sample("shift", dist.Normal(self.shift, x.new_ones(())))
            with pyro.plate("data", len(x)):
                loc, raw = self.encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return Model(), Guide()


def test_what_is_outside_a_plate_of_unknown_size(device: torch.device) -> None:
    x = pairs.data(N, device)
    model, guide = with_a_global_site(device, latent=True)
    with pytest.raises(PairError) as error:
        fit((model, guide), x, epochs=1, device=device)
    assert "global site(s) 'shift': expected a data plate that knows the full size" in str(
        error.value
    )
    assert "pyro.plate('data', 40, subsample_size=len(x))" in str(error.value)
    fit((model, guide), x, epochs=1, batch_size=None, device=device)
    model, guide = with_a_global_site(device, latent=False)
    with pytest.warns(PvaeWarning, match=r"'ridge' are outside the data plate"):
        fit((model, guide), x, epochs=1, device=device)


@pytest.mark.usefixtures("store")
def test_a_parameter_that_comes_up_late_is_warned_about(device: torch.device) -> None:
    x = pairs.data(N, device)
    calls = itertools.count()
    model, encode, _ = pairs.subsample_given(device, full=N)

    def guide(x: Tensor) -> None:
        if torch.is_grad_enabled() and next(calls) > 8:
            pyro.param("late", torch.tensor(0.5, device=device))
        encode(x)

    with pytest.warns(PvaeWarning) as found:
        fit((model, guide), x, epochs=12, device=device)
    assert any("'late' came up during training" in str(w.message) for w in found)


# Optimisers and objectives


def test_an_optimisers_own_learning_rates_are_kept(device: torch.device) -> None:
    pair = vae()

    def two_groups(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
        half = len(parameters) // 2
        groups: list[dict[str, Any]] = [
            {"params": parameters[:half], "lr": 10 * lr},
            {"params": parameters[half:]},
        ]
        return torch.optim.Adam(groups, lr=lr)

    run = fit(pair, binary(), epochs=2, optimizer=two_groups, device=device)
    assert [g["lr"] for g in run.training.stepper.optimizer.param_groups] == [1e-2, 1e-3]
    options: dict[str, Any] = {"optimizer": two_groups, "lr_schedule": schedules.Cosine()}
    run = fit(pair, binary(), epochs=2, device=device, **options)
    first, second = (g["lr"] for g in run.training.stepper.optimizer.param_groups)
    assert 0 < first == pytest.approx(10 * second)
    assert second < 1e-3


def test_an_optimiser_that_changes_its_rate_is_left_to_it(device: torch.device) -> None:
    clipped = functools.partial(pyro.optim.clipped_adam.ClippedAdam, lrd=0.5)
    pair = vae()
    run = fit(pair, binary(), epochs=2, optimizer=clipped, device=device)
    assert run.training.stepper.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": torch.optim.LBFGS}, "its step needs a closure"),
        ({"optimizer": pyro.optim.Adam({"lr": 1e-3})}, "a torch optimiser class"),
        ({"objective": ReweightedWakeSleep(num_particles=2)}, "one that returns one loss"),
        ({"objective": ELBO(plate="other")}, "the pair's data plate, 'data'; got plate='other'"),
    ],
    ids=["LBFGS", "Pyro's optimiser", "two losses", "another plate"],
)
def test_what_cant_train_is_refused(
    options: dict[str, Any], words: str, device: torch.device
) -> None:
    pair = vae()
    before = state(pair)
    with pytest.raises(ArgumentError, match=words):
        fit(pair, binary(), device=device, **options)
    assert same({k: v.cpu() for k, v in state(pair).items()}, before)


@pytest.mark.skipif(pretend.kind() is not None, reason="the pretend device has nothing sparse")
def test_sparse_gradients_are_refused(device: torch.device) -> None:
    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 2 * Q, sparse=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.embedding(y)

    pair = VAE(
        priors.StandardNormal(Q),
        lambda z, y: dist.Bernoulli(
            logits=z.sum(-1, keepdim=True).expand(*z.shape[:-1], D)
        ).to_event(1),
        guides.MeanField(Labels(), Q),
    )
    y = torch.arange(N) % 3
    with pytest.raises(ArgumentError, match=r"dense gradients; got sparse ones, of guide"):
        fit(pair, (binary(), y), device=device)


# More epochs, other settings


def test_a_schedule_over_the_whole_training_cant_be_stretched_unseen(
    tmp_path: Path, device: torch.device
) -> None:
    options: dict[str, Any] = {"lr_schedule": schedules.Cosine(), "device": device}
    pair = vae()
    run = fit(pair, binary(), epochs=2, folder=tmp_path, **options)
    with pytest.warns(PvaeWarning, match=r"'lr_schedule' spans the whole training.* 2 epoch"):
        run.refine(2)
    other = vae()
    with pytest.warns(PvaeWarning, match=r"which was 4 epoch\(s\) and now is 6"):
        fit(
            other,
            binary(),
            epochs=6,
            folder=tmp_path,
            resume=True,
            **options,
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"optimizer": functools.partial(torch.optim.Adam, weight_decay=0.1)},
            r"optimizer\.weight_decay: saved 0, now 0\.1",
        ),
        ({"data": 1 - binary()}, "data: saved .* of all 40 rows, now "),
        ({"objective": pvae.objectives.ELBO(beta=0.5)}, r"beta: saved 1\.0, now 0\.5"),
    ],
    ids=["optimiser's settings", "other data", "objective's settings"],
)
def test_other_settings_arent_resumed(
    options: dict[str, Any], words: str, tmp_path: Path, device: torch.device
) -> None:
    pair = vae()
    fit(pair, binary(), epochs=1, folder=tmp_path, device=device)
    call = {"data": binary(), "folder": tmp_path, "resume": True, "device": device, **options}
    with pytest.raises(CheckpointError, match=words):
        fit(pair, epochs=2, **call)


def test_a_shuffling_loader_takes_nothing_from_the_global_generator(device: torch.device) -> None:
    loader = DataLoader(TensorDataset(binary()), batch_size=16, shuffle=True)
    pair = vae()
    before = randomness.get_state()
    fit(pair, loader, valid=loader, epochs=2, device=device)
    assert same(randomness.get_state(), before)


def test_splits_arent_data(device: torch.device) -> None:
    pair = vae()
    with pytest.raises(DataError, match=r"one part of a data set; got Splits.*\n.*data\.train"):
        fit(pair, data.load("digits"), device=device)
