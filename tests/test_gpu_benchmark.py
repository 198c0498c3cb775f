"""`benchmarks/gpu.py`: steps end in time, results last and go on, and what must hold can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import pytest

import pvae

if TYPE_CHECKING:
    import gpu
    from gpu_steps.common import Outcome, Setting

BENCHMARKS = Path(pvae.__file__).parents[1] / "benchmarks"
STEPS = """
import os, subprocess, sys, time
from gpu_steps.common import judged

def fine(setting):
    with open(f"{setting.folder}/count", "a") as file:
        file.write("x")
    return judged(setting.device == "cpu", "a | b")

def wrong(setting):
    return judged(1 > 2, "1 > 2")

def raises(setting):
    raise ValueError("no such thing")

def dies(setting):
    print("last words", flush=True)
    os._exit(3)

def hangs(setting):
    own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(f"{setting.folder}/pid", "w") as file:
        file.write(str(own.pid))
    time.sleep(60)
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "own_steps.py").write_text(STEPS)
    import gpu

    monkeypatch.setattr(gpu, "STEPS", [])
    return gpu


def step(name: str, seconds: float = 60.0) -> gpu.Step:
    from gpu import Step

    return Step(name, f"own_steps:{name}", f"{name} holds", seconds)


def setting(tmp_path: Path, device: str = "cpu") -> Setting:
    from gpu_steps.common import Setting

    return Setting(device, short=True, folder=str(tmp_path / "work"))


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.usefixtures("runner")
def test_a_step_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    import gpu

    found = gpu.run(step("hangs", seconds=8.0), setting(tmp_path))
    assert (found["result"], found["said"]) == ("failed", "killed after 8 s")
    assert found["seconds"] < 20
    assert not is_running(int((tmp_path / "work" / "pid").read_text()))


@pytest.mark.usefixtures("runner")
def test_results_are_written_as_they_come_and_gone_on_with(tmp_path: Path) -> None:
    import gpu

    names = ("fine", "wrong", "raises", "dies")
    count, where = tmp_path / "work" / "count", setting(tmp_path)
    gpu.run_all([step("fine")], where, tmp_path)
    assert "not run yet" not in (tmp_path / "gpu.md").read_text()
    assert [*gpu.run_all([step("wrong")], where, tmp_path, seconds=0.0)["steps"]] == ["fine"]
    gpu.run_all(list(map(step, names)), where, tmp_path)
    written = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    said = {name: (one["result"], one["said"]) for name, one in written.items()}
    assert said == {
        "fine": ("passed", "a | b"),
        "wrong": ("failed", "1 > 2"),
        "raises": ("failed", "ValueError: no such thing"),
        "dies": ("failed", "ended with 3: last words"),
    }
    table = (tmp_path / "gpu.md").read_text()
    assert "| fine | fine holds | passed | a \\| b | " in table
    assert "| wrong | wrong holds | **FAILED** | 1 > 2 | " in table
    assert count.read_text() == "x"  # not once more
    gpu.run_all([step("fine")], where, tmp_path, afresh=True)
    assert count.read_text() == "x"  # in a new folder
    assert [*json.loads((tmp_path / "gpu.json").read_text())["steps"]] == ["fine"]


@pytest.mark.usefixtures("runner")
def test_what_the_end_of_the_half_hour_cuts_short_is_run_again(tmp_path: Path) -> None:
    import gpu

    where = setting(tmp_path)
    first = gpu.run_all([step("hangs")], where, tmp_path, seconds=0.5)["steps"]["hangs"]
    assert first["unfinished"]
    again = gpu.run_all([step("hangs", seconds=0.5)], where, tmp_path)["steps"]["hangs"]
    assert not again["unfinished"]


@pytest.mark.slow
def test_the_cheapest_steps_run_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--short"]
    chosen = ["--only", "doctor", "waits", "two shapes", "--afresh", "--out", str(tmp_path)]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    found = {name: one["result"] for name, one in result["steps"].items()}
    assert found == {"doctor": "passed", "waits": "left out", "two shapes": "left out"}
    assert not result["about"]["times mean something"]
    assert (tmp_path / "gpu.md").read_text().count("not run yet") == 11


# What must hold can fail


@pytest.mark.usefixtures("runner")
def test_doctor_must_name_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_steps import checks

    def result(*lines: str) -> str:
        done = SimpleNamespace(stdout="\n".join(lines), returncode=0)
        monkeypatch.setattr(checks, "python", lambda *_: done)
        return checks.doctor(setting(tmp_path, "cuda")).result

    assert result("  cuda:0: H100, 80 GiB", "no known trouble") == "passed"
    assert result("  no GPU that pvae uses", "no known trouble") == "failed"
    assert result("  cuda:0: H100, 80 GiB", "trouble: arviz", "1 known trouble(s)") == "failed"


@pytest.mark.usefixtures("runner")
@pytest.mark.parametrize(
    ("pyro", "captured", "result"),
    [(3.1, 0.46, "passed"), (2.0, 0.46, "failed"), (3.1, 0.4, "failed"), (None, 0.46, "failed")],
)
def test_bars_of_throughput(
    pyro: float | None,
    captured: float,
    result: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """5 times Pyro's SVI and 0.9 of the captured graph, of steps of 0.5 ms."""
    from gpu_steps import speed
    from gpu_steps.common import Setting

    ms = {"pvae eager": 2.0, "pvae cudagraph": 0.5, "Pyro SVI": pyro}
    ms |= {"hand-written, fused Adam": 1.0, "hand-written, fused Adam, captured": captured}
    made = {
        "sides": {name: {"ms": value} for name, value in ms.items() if value is not None},
        "left out": {name: "it failed" for name, value in ms.items() if value is None},
    }
    monkeypatch.setattr("throughput.measure", lambda *_: made)
    monkeypatch.setattr(Setting, "has_times", property(lambda _: True))
    assert speed.throughput(setting(tmp_path, "cuda")).result == result
    monkeypatch.setattr(Setting, "has_times", property(lambda _: False))
    assert speed.throughput(setting(tmp_path, "cuda")).result != "passed"


@pytest.mark.usefixtures("runner")
def test_stages_of_the_schedule() -> None:
    """Burda et al.: 3^i passes at 10^(-i / 7) for i = 0 to 7, which are 3,280."""
    from gpu_steps.speed import STAGES, Burda

    factor = Burda().resolve(10, 32800)
    rates = [factor(10 * epoch) for epoch in range(3280)]
    assert STAGES[-1] == 3280
    for i in range(8):
        count = sum(abs(rate - 10 ** (-i / 7)) < 1e-12 for rate in rates)
        assert count == 3**i


@pytest.mark.usefixtures("runner")
def test_a_memory_map_that_leaks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_steps import trainings

    (tmp_path / "work").mkdir()
    monkeypatch.setattr(trainings, "fit", lambda *_, **__: SimpleNamespace(history={"loss": [1.0]}))
    memory = [0]

    def outcome(more: int) -> Outcome:
        def allocated(_: str) -> int:
            memory[0] += more
            return memory[0]

        monkeypatch.setattr(trainings, "allocated", allocated)
        return trainings.memory_map(setting(tmp_path))

    assert outcome(0).result == "passed"
    assert outcome(2**20).result == "failed"
