"""Steps as CUDA graphs: captured on a GPU; on a CPU, all but the capture itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pvae import fit, recipes
from pvae import objectives as o
from pvae.engine import Stepper, captured
from pvae.engine.passes import PassResult
from pvae.errors import ArgumentError, PvaeWarning
from pvae.modes import capturing_graph
from tests import test_compiled as c

pytestmark = pytest.mark.usefixtures("store")
Function = Callable[..., PassResult]


def sgd_stepper(device: torch.device) -> tuple[Stepper, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, guide, batch = c.vae(device)
    stepper = c.stepper((model, guide, batch), o.ELBO(), "eager")
    parameters = stepper.parameters
    stepper.optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.5)
    return stepper, batch


def captures(stepper: Stepper) -> None:
    stepper.engine = "cudagraph"


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In place of a capture, a function that runs again; counts its runs by graph."""
    counts: list[int] = []

    def record(function: Function, example: tuple[Tensor, ...]) -> Function:
        counts.append(0)
        mine = len(counts) - 1

        def replay(*batch: Tensor) -> PassResult:
            assert [x.shape for x in batch] == [x.shape for x in example]
            counts[mine] += 1
            with capturing_graph():
                return function(*batch)

        return replay

    monkeypatch.setattr(captured, "record", record)
    monkeypatch.setattr(captured, "run_aside", lambda function, batch: function(*batch))
    monkeypatch.setattr("pvae.engine.stepper.check_engine", lambda *_: None)
    return counts


def test_what_is_around_a_capture(replays: list[int]) -> None:
    """Shapes, learning rates, other settings: the numbers are the eager ones throughout."""

    def trained(engine: Any) -> tuple[list[dict[str, float]], list[Tensor]]:
        stepper, batch = sgd_stepper(torch.device("cpu"))
        stepper.engine = engine
        torch.manual_seed(1)
        found = []
        for step in range(12):
            rows = 5 if step % 4 == 3 else len(batch[0])
            if step == 6:
                stepper.optimizer.param_groups[0]["lr"] = 0.1
            if step == 8:
                stepper.optimizer.param_groups[0]["momentum"] = 0.9
            stepper((batch[0][:rows],), step)
            found.append(stepper.averages())
        return found, [p.detach().clone() for p in stepper.parameters]

    expected, parameters = trained("eager")
    found, again = trained("cudagraph")
    assert not replays[1:]  # 3 runs of each kind come first; those with another momentum are 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    for p, q in zip(again, parameters, strict=True):
        torch.testing.assert_close(p, q)
    assert replays[0] == 1 + 3  # the check, and steps 4, 5 and 6


def test_a_graph_with_other_numbers_is_not_used(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = captured.record

    def wrong(function: Function, example: tuple[Tensor, ...]) -> Function:
        replay = record(function, example)
        return lambda *batch: replay(*(1 - x for x in batch))

    monkeypatch.setattr(captured, "record", wrong)
    stepper, batch = sgd_stepper(torch.device("cpu"))
    captures(stepper)
    for step in range(captured.WARM_UP):
        stepper(batch, step)
    before = [p.detach().clone() for p in stepper.parameters]
    twin, _ = sgd_stepper(torch.device("cpu"))
    for p, value in zip(twin.parameters, before, strict=True):
        p.data.copy_(value)
    for ours, theirs in zip(stepper.parameters, twin.parameters, strict=True):
        state = stepper.optimizer.state[ours]["momentum_buffer"]
        twin.optimizer.state[theirs]["momentum_buffer"] = state.clone()
    torch.manual_seed(5)
    with pytest.warns(PvaeWarning, match=r"not captured: loss or gradient differ .* by 0\.\d"):
        stepper(batch, 3)
    torch.manual_seed(5)
    twin(batch, 3)
    assert stepper.engine == "eager"
    for p, q in zip(stepper.parameters, twin.parameters, strict=True):
        torch.testing.assert_close(p, q)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA, and before anything is overwritten."""
    vae, x = recipes.vae(6, 2, hidden=(4,)), torch.rand(20, 6).round()
    fit(vae, x, epochs=1, folder=tmp_path, device="cpu")
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ArgumentError, match="a pair on one CUDA device, for 'cudagraph'; got cpu"):
        fit(
            vae,
            x,
            epochs=1,
            folder=tmp_path,
            device="cpu",
            engine="cudagraph",
            overwrite=True,
        )
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    stepper, batch = sgd_stepper(torch.device("cpu"))

    def fails(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(captured, "record", fails)
    monkeypatch.setattr(captured, "run_aside", lambda function, batch: function(*batch))
    monkeypatch.setattr("pvae.engine.stepper.check_engine", lambda *_: None)
    captures(stepper)
    for step in range(captured.WARM_UP):
        stepper(batch, step)
    with pytest.warns(PvaeWarning, match="the capture fails with operation not permitted when"):
        stepper(batch, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")
def test_on_a_gpu() -> None:
    """Steps give the eager numbers, draws among them."""
    cases: list[tuple[Any, o.Objective]] = [
        (c.vae, o.ELBO()),
        (c.vae, o.IWAE(3)),
        (c.vae, o.DReG(3)),
    ]
    cases += [(c.noisy, o.ELBO()), (c.flow, o.ELBO())]
    for kind, objective in cases:
        found = []
        for engine in ("eager", "cudagraph"):
            torch.manual_seed(0)
            pair = kind(torch.device("cuda"))
            stepper = c.stepper(pair, objective, engine)
            found.append(c.run(stepper, [pair[2]] * 8))
            assert stepper.engine == engine
        for ours, theirs in zip(*found, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
