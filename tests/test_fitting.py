"""fit: the same steps as SVI, history, schedules, early stopping, data of every kind, failures."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae import bounds, data, randomness, recipes, schedules
from pvae.errors import ArgumentError, PvaeWarning
from pvae.internals import can_skip_on_device
from pvae.objectives import ELBO
from tests import pairs
from tests.fits import D, N, Q, binary, fit, same, state, vae

# The same as SVI


def test_loss_and_gradients_are_svis(device: torch.device) -> None:
    """One step on one batch, same seed: SVI's loss and gradients, divided by the number of data."""
    x = binary(16).to(device)
    ours, theirs = vae().to(device), vae().to(device)
    run = fit(ours, x, epochs=1, lr=1e-12, seed=7, device=device)
    svi = SVI(theirs.model, theirs.guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    torch.manual_seed(7)
    loss = Trace_ELBO().differentiable_loss(theirs.model, theirs.guide, x)
    loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    assert run.history[0]["loss"] == pytest.approx(float(loss.detach()) / 16, rel=1e-12)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        expected = gradients[name]
        assert expected is not None
        torch.testing.assert_close(parameter.grad, expected / 16)
    torch.manual_seed(7)
    assert svi.evaluate_loss(x) == pytest.approx(float(loss.detach()))


def test_whole_trainings_are_svis(device: torch.device) -> None:
    """The same batches, and Adam on a loss divided by N, which it sees in its epsilon alone."""
    x = binary(48).to(device)
    ours, theirs = vae().to(device), vae().to(device)
    fit(ours, x, epochs=10, lr=1e-3, seed=7, device=device)
    svi = SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 1e-3, "eps": 16e-8}), Trace_ELBO())
    batches = data.Batches(data.as_source(x, device, torch.float64), 16, seed=7)
    torch.manual_seed(7)
    for epoch in range(10):
        for (batch,) in batches.epoch(epoch):
            svi.step(batch)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_scaled_plates_loss_is_divided_by_its_full_size(device: torch.device) -> None:
    model, guide, (x,) = pairs.subsample_given(device, n=16, full=100)
    run = fit((model, guide), x, epochs=1, lr=1e-12, seed=3, device=device)
    torch.manual_seed(3)
    total = Trace_ELBO().loss(model, guide, x)
    assert run.history[0]["loss"] == pytest.approx(total / 100)
    assert run.history[0]["elbo"] == pytest.approx(-total / 100)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("name", pairs.PAIRS)
def test_fit_takes_pairs_that_pvae_did_not_build(name: str, device: torch.device) -> None:
    model, guide, batch = pairs.PAIRS[name](device, n=N)
    run = fit((model, guide), batch, epochs=40, lr=2e-2, valid=batch, device=device)
    moved = [p for p in run.structure.parameters.values() if p.grad is not None]
    assert len(moved) == len(run.structure.parameters)
    losses = run.history["loss"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    assert all(math.isfinite(v) for v in run.history["valid_elbo"])


@pytest.mark.usefixtures("store")
def test_a_function_pairs_parameters_stay_in_the_store(device: torch.device) -> None:
    model, guide, batch = pairs.functions(device)
    fit((model, guide), batch, epochs=1, device=device)
    names = set(pyro.get_param_store().keys())
    assert {n.split("$")[0] for n in names} == {"decoder", "encoder"}


def test_a_module_pair_leaves_the_store_alone(device: torch.device) -> None:
    pair = vae()
    fit(pair, binary(), epochs=1, device=device)
    assert len(pyro.get_param_store()) == 0


def test_a_function_that_announces_nothing_is_warned_about_once(device: torch.device) -> None:
    """By the tool that looks first, at the line that called it; not again by the next one."""
    decoder = nn.Linear(Q, D).to(device)
    _, guide, (x,) = pairs.subsample_given(device, full=12)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior = pyro.distributions.Normal(x.new_zeros(Q), x.new_ones(Q)).to_event(1)
            z = pyro.sample("z", prior)
            likelihood = pyro.distributions.Normal(decoder(z), 1.0).to_event(1)
            pyro.sample("x", likelihood, obs=x)

    pair = pvae.Pair(model, guide)
    words = r"The pair uses 'Linear.weight' and 'Linear.bias', but"
    with pytest.warns(PvaeWarning, match=words) as found:
        fit(pair, x, epochs=1, device=device)
    assert [warning.filename for warning in found] == [__file__]
    bounds.elbo(pair, x)


# Global state


def test_fit_leaves_generators_and_modes_as_found(device: torch.device) -> None:
    pair = vae().eval()
    before = randomness.get_state()
    fit(pair, binary(), epochs=2, valid=binary(), device=device)
    assert same(randomness.get_state(), before)
    assert not any(m.training for m in pair.modules())


def test_the_result_is_a_function_of_the_seed(device: torch.device) -> None:
    results = []
    for seed in (1, 1, 2):
        pair = vae()
        torch.rand(seed)  # the caller's generator doesn't matter
        fit(pair, binary(), epochs=3, seed=seed, device=device)
        results.append(state(pair))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_validation_is_on_for_the_first_step_alone(device: torch.device) -> None:
    seen = []

    class Model(pvae.Model):
        def forward(self, x: Tensor | None, *context: Tensor, size: int | None = None) -> Tensor:
            seen.append(pyro.settings.get("validate_poutine"))
            return super().forward(x, *context, size=size)

    pair = vae()
    pair.model.__class__ = Model
    fit(pair, binary(), epochs=2, device=device)
    training = seen[-6:]  # three batches an epoch, after the probes
    assert training == [True, False, False, False, False, False]


# History and schedules


def test_history_adds_up(device: torch.device) -> None:
    pair = vae()
    run = fit(pair, binary(), epochs=3, valid=binary(8), device=device)
    assert [r["epoch"] for r in run.history] == [0, 1, 2]
    assert [r["step"] for r in run.history] == [3, 6, 9]
    for record in run.history:
        assert record["elbo"] == pytest.approx(record["log_likelihood"] - record["rate"])
        assert record["loss"] == pytest.approx(-record["elbo"])
        assert record["valid_elbo"] == pytest.approx(
            record["valid_log_likelihood"] - record["valid_rate"]
        )
    check = bounds.elbo(pair, binary(8), seed=0)
    assert run.history[-1]["valid_elbo"] == pytest.approx(check.mean)
    assert "valid_elbo" in repr(run.history)
    assert "Fit of 8 parameter tensors" in repr(run)


def test_what_is_optimised_with_a_point_is_called_log_joint(device: torch.device) -> None:
    torch.manual_seed(0)
    pair = recipes.ae(D, Q, hidden=(8,))
    run = fit(pair, binary(), epochs=2, valid=binary(8), device=device)
    assert "elbo" not in run.history[0]
    assert run.history[0]["rate"] is None
    assert run.history[0]["valid_log_joint"] < 0
    assert run.history["log_joint"][0] == pytest.approx(-run.history["loss"][0])


def test_warm_up_logs_the_true_elbo_beside_the_loss(device: torch.device) -> None:
    pair = vae()
    objective = ELBO(beta=schedules.Warmup(2, "epochs"))
    run = fit(pair, binary(), objective, epochs=3, device=device)
    betas = run.history["beta"]
    assert betas == pytest.approx([0.5, 1.0, 1.0])
    first = run.history[0]
    assert first["elbo"] == pytest.approx(first["log_likelihood"] - first["rate"])
    assert first["loss"] < -first["elbo"]


def test_a_warm_up_that_outlasts_the_training_is_warned_about(device: torch.device) -> None:
    pair = vae()
    with pytest.warns(PvaeWarning, match=r"beta reaches its end at step 30.*it ends at 0\.2"):
        fit(
            pair,
            binary(),
            ELBO(beta=schedules.Warmup(10, "epochs")),
            epochs=2,
            device=device,
        )


def test_learning_rate_schedule(device: torch.device) -> None:
    pair = vae()
    run = fit(
        pair,
        binary(),
        epochs=4,
        lr=0.1,
        lr_schedule=schedules.Cosine(),
        device=device,
    )
    expected = [0.05 * (1 + math.cos(math.pi * (3 * e + 2) / 12)) for e in range(4)]
    assert run.history["lr"] == pytest.approx(expected)


def test_gradients_are_clipped_by_their_global_norm(device: torch.device) -> None:
    pair = vae()
    before = state(pair)
    sgd = functools.partial(torch.optim.SGD)
    run = fit(
        pair,
        binary(16),
        epochs=1,
        optimizer=sgd,
        lr=1.0,
        clip_norm=0.25,
        device=device,
    )
    after = state(pair)
    squares = [(after[n] - before[n].to(device)).square().sum() for n, _ in pair.named_parameters()]
    assert float(torch.stack(squares).sum().sqrt()) == pytest.approx(0.25, rel=1e-5)
    assert run.history[0]["grad_norm"] > 0.25  # as it was before


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adam,
        torch.optim.Adamax,
        torch.optim.RMSprop,
        functools.partial(torch.optim.SGD, momentum=0.9),
        functools.partial(torch.optim.AdamW, weight_decay=0.1),
    ],
    ids=["adam", "adamax", "rmsprop", "sgd", "adamw"],
)
def test_one_optimiser_of_any_kind(optimizer: Any, device: torch.device) -> None:
    pair = vae()
    run = fit(pair, binary(), epochs=60, optimizer=optimizer, lr=1e-2, device=device)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    assert len(run.training.stepper.optimizer.param_groups) == 1
    fused = "fused" in run.training.stepper.optimizer.param_groups[0]
    assert can_skip_on_device(run.training.stepper.optimizer) is fused


@pytest.mark.parametrize(
    "objective", [TraceMeanField_ELBO(), RenyiELBO(num_particles=2), Trace_ELBO(num_particles=3)]
)
def test_other_objectives_of_pyro_run(objective: Any, device: torch.device) -> None:
    pair = vae()
    run = fit(pair, binary(), objective, epochs=60, lr=1e-2, device=device)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    if not isinstance(objective, Trace_ELBO):
        assert run.history[0]["elbo"] is None


def test_several_particles(device: torch.device) -> None:
    pair = vae()
    run = fit(pair, binary(), ELBO(num_particles=5), epochs=2, device=device)
    assert run.history[-1]["elbo"] < 0


# Early stopping


def test_early_stopping_ends_with_the_best_epoch(device: torch.device) -> None:
    pair = vae()
    few, other = binary(16), binary(17)[:8]
    run = fit(
        pair,
        few,
        epochs=400,
        lr=3e-2,
        valid=other,
        patience=5,
        device=device,
    )
    values = run.history["valid_elbo"]
    assert len(values) < 400
    best = max(values)
    assert run.progress.best == best
    assert run.progress.best_epoch == values.index(best) == len(values) - 6
    again = bounds.elbo(pair, other, seed=0)
    assert again.mean == pytest.approx(best)


def test_patience_needs_validation_data() -> None:
    with pytest.raises(ArgumentError, match="valid=x_valid"):
        fit(vae(), binary(), patience=3)


# More training


def test_refine_goes_on_where_fit_ended(device: torch.device) -> None:
    once, twice = vae(), vae()
    fit(once, binary(), epochs=6, device=device)
    run = fit(twice, binary(), epochs=2, device=device)
    run.refine(4)
    assert same(state(once), state(twice))
    assert len(run.history) == 6


# Data of every kind


def as_memmap(x: Tensor, tmp_path: Path) -> np.memmap:
    path = tmp_path / "x.npy"
    np.save(path, x.numpy())
    loaded = np.load(path, mmap_mode="r")
    assert isinstance(loaded, np.memmap)
    return loaded


class Items(torch.utils.data.Dataset):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]


KINDS: dict[str, Any] = {
    "tensor": lambda x, p: x,
    "array": lambda x, p: x.numpy(),
    "float32 array": lambda x, p: x.float().numpy(),
    "bytes": lambda x, p: x.to(torch.uint8),
    "booleans": lambda x, p: x.bool().numpy(),
    "tuple": lambda x, p: (x,),
    "memmap": as_memmap,
    "dataset": lambda x, p: TensorDataset(x),
    "items": lambda x, p: Items(x),
    "data": lambda x, p: data.Data((x,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_data_in_any_form_give_the_same_fit(
    kind: str, tmp_path: Path, device: torch.device
) -> None:
    pair, expected = vae(), vae()
    fit(expected, binary(), epochs=2, device=device)
    run = fit(pair, KINDS[kind](binary(), tmp_path), epochs=2, device=device)
    assert same(state(pair), state(expected))
    assert run.training.source.exact


def test_a_data_loader_of_the_users_own(device: torch.device) -> None:
    pair = vae()
    loader = DataLoader(TensorDataset(binary()), batch_size=8, shuffle=True)
    run = fit(pair, loader, epochs=3, valid=loader, device=device, batch_size="auto")
    assert run.history["step"] == [5, 10, 15]
    assert not run.training.source.exact


def test_labels_go_along(device: torch.device) -> None:
    pair = vae(num_classes=3)
    y = torch.arange(N) % 3
    run = fit(pair, (binary(), y), valid=(binary(), y), device=device)
    assert math.isfinite(run.history[-1]["valid_elbo"])


def test_dynamic_binarisation(device: torch.device) -> None:
    pair = vae()
    grey = data.Data((torch.rand(N, D),), binarize="dynamic")
    run = fit(pair, grey, epochs=3, valid=grey, device=device)
    assert math.isfinite(run.history[-1]["valid_elbo"])


def test_a_pair_that_subsamples_itself_gets_all_data(device: torch.device) -> None:
    model, guide, (x,) = pairs.subsample_drawn(device, n=N, size=10)
    run = fit((model, guide), x, epochs=3, device=device)
    assert run.history["step"] == [4, 8, 12]
    assert run.training.batches.batch_size == N
