"""What is around steps as CUDA graphs, on a CPU; `test_graphs` has the graphs themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pvae import fit, recipes, schedules
from pvae import objectives as o
from pvae.engine import Stepper, captured
from pvae.engine.passes import PassResult
from pvae.errors import ArgumentError, PvaeWarning
from pvae.modes import capturing_graph
from tests import test_compiled as c

pytestmark = pytest.mark.usefixtures("store")
Function = Callable[..., Any]


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

    class Replaying:
        def __init__(self, device: torch.device) -> None:
            pass

        def record(self, function: Function, example: tuple[Tensor, ...]) -> Function:
            counts.append(0)
            mine = len(counts) - 1

            def replay(*batch: Tensor) -> PassResult:
                assert [x.shape for x in batch] == [x.shape for x in example]
                counts[mine] += 1
                with capturing_graph():
                    return function(*batch)

            return replay

        def run_aside(self, function: Function, batch: tuple[Tensor, ...]) -> PassResult:
            return function(*batch)

    monkeypatch.setattr(captured, "Recorder", Replaying)
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
    class Wrong(captured.Recorder):
        def record(self, function: Function, example: tuple[Tensor, ...]) -> Function:
            replay = super().record(function, example)
            return lambda *batch: replay(*(1 - x for x in batch))

    monkeypatch.setattr(captured, "Recorder", Wrong)
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


def test_a_capture_that_fails(replays: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(captured.Recorder):
        def record(self, function: Function, example: tuple[Tensor, ...]) -> Function:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(captured, "Recorder", Failing)
    stepper, batch = sgd_stepper(torch.device("cpu"))
    captures(stepper)
    for step in range(captured.WARM_UP):
        stepper(batch, step)
    with pytest.warns(PvaeWarning, match="the capture fails with operation not permitted when"):
        stepper(batch, 3)
    assert not replays


def launches(stepper: Stepper, batch: tuple[Tensor, ...], step: int) -> Counter[str]:
    """What a step gives the device to do, one by one."""
    seen: Counter[str] = Counter()

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    with Seeing():
        stepper(batch, step)
    return seen


def test_nothing_but_the_graph_is_launched(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But what has changed on the host: a learning rate, a schedule's value, a step's number."""

    class Silent(captured.Recorder):
        def record(self, function: Function, example: tuple[Tensor, ...]) -> Function:
            replay = super().record(function, example)
            return lambda *batch: replay(*batch) if len(replays) < 2 else last[0]

    model, guide, batch = c.vae(torch.device("cpu"))
    objective = o.GECO(tolerance=4.0, penalty_weight=schedules.Warmup(6))
    monkeypatch.setattr(captured, "Recorder", Silent)
    stepper = c.stepper((model, guide, batch), objective, "cudagraph")
    for step in range(captured.WARM_UP + 1):
        stepper(batch, step)
    last = [stepper.passes.run(*batch)]
    replays.append(0)
    assert launches(stepper, batch, 4) == {"fill_": 1}  # of the schedule
    assert launches(stepper, batch, 5) == {"fill_": 1}
    assert not launches(stepper, batch, 6)
    stepper.optimizer.param_groups[0]["lr"] = 0.1
    assert launches(stepper, batch, 7) == {"fill_": 1}
    assert launches(stepper, batch, 9) == {"fill_": 1}  # not the one that comes next


@pytest.mark.parametrize("where", ["state", "group"])
def test_an_optimiser_that_counts_in_python(where: str, replays: list[int]) -> None:
    """A graph would have its counters as they were."""

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for holder in (
                    [self.state[p] for p in group["params"]] if where == "state" else [group]
                ):
                    holder["n"] = holder.get("n", 0) + 1
            super().step()

    words = {
        "state": "Counting keeps its 'n' in Python",
        "group": "the optimiser's 'n' changes from step to step",
    }
    model, guide, batch = c.vae(torch.device("cpu"))
    stepper = c.stepper((model, guide, batch), o.ELBO(), "cudagraph")
    stepper.optimizer = Counting(stepper.parameters, lr=1e-2)
    with pytest.warns(PvaeWarning, match=words[where]):
        c.run(stepper, [batch] * 6)
    assert stepper.engine == "eager"
    holders = [*stepper.optimizer.state.values(), *stepper.optimizer.param_groups]
    assert {holder["n"] for holder in holders if "n" in holder} == {6}  # not what was tried
