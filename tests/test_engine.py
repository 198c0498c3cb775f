"""One step: nothing waits for the device, nothing bad is kept, one optimiser, fused or not."""

from __future__ import annotations

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pvae import randomness, recipes
from pvae.engine import PARTS, MixedStepper, Stepper, make_optimizer
from pvae.engine.optimizers import Backup, OptimizerLike, update
from pvae.errors import ArgumentError
from pvae.internals import can_skip_on_device
from pvae.objectives import ELBO
from pvae.pair import Pair

D, Q, N = 6, 2, 16


def make(device: torch.device, optimizer: Any = torch.optim.Adam) -> tuple[Stepper, Tensor]:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(N, D, device=device).round()
    structure = vae.inspect((x,))
    parameters = list(structure.parameters.values())
    objective = ELBO()
    stepper = Stepper(
        structure,
        objective,
        make_optimizer(optimizer, parameters, 1e-3),
        objective.make_state(structure),
        clip_norm=1.0,
    )
    return stepper, x


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_a_step_waits_for_nothing(
    optimizer: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value is read back: on CUDA torch itself watches, on the CPU reading raises."""
    stepper, x = make(device, optimizer)
    with pyro.validation_enabled(is_validate=False):
        stepper((x,), 0)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        else:

            def refuse(*_: Any) -> None:
                raise AssertionError("a value was read back")

            for name in ("item", "tolist", "__float__", "__int__"):
                monkeypatch.setattr(Tensor, name, refuse)
        try:
            for step in range(1, 4):
                stepper((x,), step)
        finally:
            monkeypatch.undo()
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert set(stepper.averages()) == {*PARTS, "rows"}


def test_averages_are_over_data_and_start_anew(device: torch.device) -> None:
    stepper, x = make(device)
    losses = []
    for rows in (16, 4):
        stepper((x[:rows],), 0)
        total = stepper.averages()["loss"]
        losses.append(total)
    whole = stepper.averages()
    assert whole["elbo"] == pytest.approx(-whole["loss"])
    stepper.reset()
    stepper((x[:4],), 0)
    assert stepper.averages()["loss"] != losses[0]


def test_adam_is_fused_and_others_are_not(device: torch.device) -> None:
    assert can_skip_on_device(make(device)[0].optimizer) is (device.type != "mps")
    assert not can_skip_on_device(make(device, torch.optim.RMSprop)[0].optimizer)


@pytest.mark.parametrize("ok", [True, False])
def test_a_backup_is_put_back_after_a_failure_alone(ok: bool, device: torch.device) -> None:
    tensors = [torch.ones(3, device=device), torch.zeros((), dtype=torch.int64, device=device)]
    backup = Backup(tensors)
    for tensor in tensors:
        tensor.add_(5)
    backup.restore_unless(torch.tensor(ok, device=device))
    assert tensors[0].tolist() == ([6.0] * 3 if ok else [1.0] * 3)
    assert int(tensors[1]) == (5 if ok else 0)


def test_the_first_failure_is_the_one_named(device: torch.device) -> None:
    stepper, x = make(device)
    bad = x.clone()
    bad[0, 0] = float("nan")
    with pyro.validation_enabled(is_validate=False):
        stepper((x,), 0)
        before = [p.detach().clone() for p in stepper.parameters]
        assert stepper.look() is None
        for step, batch in enumerate((bad, x, bad), start=1):
            stepper((batch,), step)
    failure = stepper.look()
    assert failure is not None
    assert failure.step == 1
    assert set(failure.sites) == {"z", "x"}
    for parameter, expected in zip(stepper.parameters, before, strict=True):
        assert torch.equal(parameter, expected)
    steps = {float(s["step"]) for s in stepper.optimizer.state.values()}
    assert steps == {1.0}


@pytest.mark.usefixtures("store")
def test_a_kind_of_batch_that_fails_later_is_not_named(device: torch.device) -> None:
    """Not even if it has had no step before."""
    first, x = make(device)

    def program(*data: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(D, device=device))
        with pyro.plate("data", N):
            u = pyro.sample("u", dist.Normal(loc, 1.0).to_event(1))
            if data:
                pyro.sample("y", dist.Normal(u, 1.0).to_event(1), obs=data[0])

    structure = Pair(program, lambda _: program()).inspect((x,))
    optimizer = make_optimizer(torch.optim.Adam, [*structure.parameters.values()])
    later = Stepper(structure, ELBO(), optimizer, ELBO().make_state(structure))
    both = MixedStepper({"first": first, "later": later})
    with pyro.validation_enabled(is_validate=False):
        for step, kind in enumerate(("first", "later")):
            both((kind, (x * torch.nan,)), step)
    failure = both.look()
    assert failure is not None
    assert failure.step == 0
    assert set(failure.sites) == {"z", "x"}
    assert "loc" not in failure.parameters


@pytest.mark.parametrize(
    "kind",
    [
        torch.optim.Adam,
        torch.optim.NAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        functools.partial(torch.optim.SGD, momentum=0.9),
    ],
)
def test_a_first_step_that_failed_leaves_the_optimiser_new(
    kind: OptimizerLike, device: torch.device
) -> None:
    with randomness.forked(1):
        alone, x = make(device, kind)
        alone((x,), 0)
    with randomness.forked(1):
        stepper, _ = make(device, kind)
        at_start = randomness.get_state()
    with pyro.validation_enabled(is_validate=False):
        for step in range(2):
            stepper((torch.full_like(x, torch.nan),), step)
    assert stepper.look() is not None
    stepper.recover(0)
    randomness.set_state(at_start)
    stepper((x,), 0)
    for parameter, expected in zip(stepper.parameters, alone.parameters, strict=True):
        assert torch.equal(parameter, expected)


def test_a_loss_without_gradients_is_refused(device: torch.device) -> None:
    stepper, x = make(device)
    for parameter in stepper.parameters:
        parameter.requires_grad = False
    with pytest.raises(ArgumentError, match="a loss that depends on its parameters"):
        stepper((x,), 0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        (torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}),
        (torch.optim.Adam, {"amsgrad": True}),
    ],
    ids=["Adam", "decoupled", "AdamW", "amsgrad"],
)
def test_updates_are_the_optimisers_own(
    kind: Any, options: dict[str, Any], device: torch.device
) -> None:
    """In groups with rates of their own, one parameter without gradients."""
    ends = []
    for take_step in (lambda o, p: update(o, torch.ones((), device=device) > 0, p), _step):
        torch.manual_seed(0)
        parameters = [torch.randn(3, 2, device=device, requires_grad=True) for _ in range(4)]
        groups = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.01}]
        optimizer = kind(groups, fused=True, **options)
        for _ in range(5):
            for p in parameters[:3]:
                p.grad = torch.randn(3, 2, device=device)
            take_step(optimizer, parameters)
        ends.append([p.detach() for p in parameters])
    for ours, theirs in zip(*ends, strict=True):
        assert torch.equal(ours, theirs)


def _step(optimizer: torch.optim.Optimizer, _: Any) -> None:
    optimizer.step()


@pytest.mark.parametrize("watch", ["hook", "wrapper"])
def test_what_watches_steps_sees_every_update(watch: str, device: torch.device) -> None:
    """Learning rate schedulers wrap an optimiser's step."""
    parameter, seen = torch.zeros(2, device=device, requires_grad=True), []
    optimizer: Any = torch.optim.Adam([parameter], fused=True)
    if watch == "hook":
        optimizer.register_step_post_hook(lambda *_: seen.append(1))
    else:
        own = optimizer.step

        def counted() -> None:
            seen.append(1)
            own()

        optimizer.step = counted
    for _ in range(3):
        parameter.grad = torch.ones(2, device=device)
        update(optimizer, torch.ones((), device=device) > 0, [parameter])
    assert len(seen) == 3
