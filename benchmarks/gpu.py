"""What a first half hour with a GPU runs: is everything right on it, and how fast.

    python benchmarks/gpu.py [--device cuda] [--short] [--afresh] [--minutes 30] [--only STEP ...]

Each step runs in a process of its own, which is killed after the seconds that it has; results are
written as each ends, to ``benchmarks/results/gpu.md`` and ``gpu.json``. A second call goes on with
the steps that have none yet, or were cut short by the end of the half hour, as long as commit,
device and sizes are those of the first; ``--afresh`` forgets them. Without a GPU

    python -m tests.pretend cuda -- benchmarks/gpu.py --short

runs all of it on the pretend device, where times mean nothing, and ``--device cpu`` on the CPU;
what these find, and whatever is short, is written to a folder of ``build/gpu``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_steps.common import ROOT, Setting, path_of
from provenance import made_with

from pvae.devices import counts


@dataclass(frozen=True)
class Step:
    """One of the things that a half hour looks at.

    Attributes:
        name: What it is called on the command line.
        target: Where its function is, ``module:function``.
        holds: What must hold, in words.
        seconds: After which it is killed.
    """

    name: str
    target: str
    holds: str
    seconds: float


CHECKS, TRAININGS, SPEED = (f"gpu_steps.{name}" for name in ("checks", "trainings", "speed"))
STEPS = [
    Step("doctor", f"{CHECKS}:doctor", "it names the device, and knows no trouble", 60),
    Step("engine", f"{CHECKS}:engine_tests", "tests of engine and graphs pass", 240),
    Step("readme", f"{CHECKS}:readme", "README and how-tos run, no device said", 180),
    Step("fallback", f"{CHECKS}:fallback", "a capture that fails is said once; numbers stay", 120),
    Step("memory map", f"{TRAININGS}:memory_map", "20 times the same losses, no leak", 180),
    Step("waits", f"{CHECKS}:waits", "no step waits for the device", 120),
    Step("engines", f"{CHECKS}:engines", "losses: 1e-4 of eager ones, bf16 0.02", 240),
    Step("suite", f"{CHECKS}:suite", "all quick tests pass on the device", 480),
    Step("resume", f"{TRAININGS}:kill_and_resume", "bit for bit; TF32 is in the checkpoint", 180),
    Step("two shapes", f"{TRAININGS}:two_shapes", "at most 1.5 times the memory of one", 90),
    Step("two GPUs", f"{TRAININGS}:two_gpus", "losses within 1e-3 of one process's", 180),
    Step("throughput", f"{SPEED}:throughput", "5x Pyro SVI; 0.9 of a hand-captured graph", 240),
    Step("epoch", f"{SPEED}:epoch", "60,000 images at batch 128 in 0.15 s", 90),
    Step("schedule", f"{SPEED}:schedule", "evidence rises from stage to stage", 420),
]


def run(step: Step, setting: Setting) -> dict[str, Any]:
    """A step's outcome; that of one that was killed says so."""
    started = time.perf_counter()
    folder = Path(setting.folder)
    folder.mkdir(parents=True, exist_ok=True)
    place = step.name.replace(" ", "-")
    file, log = folder / f"{place}.json", folder / f"{place}.log"
    file.unlink(missing_ok=True)
    given = json.dumps(asdict(replace(setting, seconds=step.seconds)))
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu_steps.child", step.target, given, str(file)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path_of("PYTHONPATH")},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        was_killed = False
        try:
            process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            was_killed = True
        finally:  # and all that it has started, on Ctrl-C, too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: dict[str, Any] = {"result": "failed", "numbers": {}, "unfinished": False}
    if was_killed:
        found["said"] = f"killed after {step.seconds:g} s"
    elif file.exists():
        found |= json.loads(file.read_text())
    else:
        lines = log.read_text().strip().splitlines() or ["nothing was said"]
        found["said"] = f"ended with {process.returncode}: {lines[-1]}"
    return {**found, "holds": step.holds, "seconds": round(time.perf_counter() - started, 1)}


def about(setting: Setting) -> dict[str, Any]:
    """What results of two calls must have in common to stand in one table."""
    if setting.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = {"mps": "Apple's GPU"}.get(setting.device, "the CPU")
    made = made_with(0)
    del made["minutes"]
    return {
        "device": setting.device,
        "name": name,
        "count": torch.cuda.device_count() if setting.device == "cuda" else 1,
        "cuda": torch.version.cuda,
        "times mean something": setting.has_times,
        "short": setting.short,
        **made,
    }


def run_all(
    steps: Sequence[Step],
    setting: Setting,
    out: Path,
    *,
    seconds: float = 1800.0,
    afresh: bool = False,
) -> dict[str, Any]:
    """Runs the steps that have no result yet, as far as time goes; writes after each."""
    ends, what = time.perf_counter() + seconds, about(setting)
    result = None if afresh else earlier(out, what)
    if result is None:
        result = {"about": what, "steps": {}}
        shutil.rmtree(setting.folder, ignore_errors=True)
    for step in steps:
        known = result["steps"].get(step.name)
        if known is not None and not known["unfinished"]:
            continue
        left = ends - time.perf_counter()
        if left <= 0:
            break
        print(f"{step.name} ...", file=sys.stderr, flush=True)
        limit = min(step.seconds, left)
        found = run(replace(step, seconds=limit), setting)
        found["unfinished"] |= found["said"].startswith("killed") and limit < step.seconds
        result["steps"][step.name] = found
        write(result, out)
        print(f"  {found['result']}: {found['said']} ({found['seconds']} s)", flush=True)
    return result


def earlier(out: Path, what: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a call before, if they were made with the same."""
    with suppress(OSError, ValueError):
        result: dict[str, Any] = json.loads((out / "gpu.json").read_text())
        if result["about"] == what:
            return result
    return None


def write(result: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    what, found = result["about"], result["steps"]
    texts = {"gpu.json": json.dumps(result, indent=1) + "\n", "gpu.md": page(what, found)}
    for name, text in texts.items():
        partial = out / f".{name}.partial"
        partial.write_text(text)
        partial.replace(out / name)


def page(what: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    pretend = "" if what["times mean something"] else " Times mean nothing on this device."
    lines = [
        "# A first half hour with a GPU",
        "",
        f"Made by `python benchmarks/gpu.py{' --short' if what['short'] else ''}` at commit "
        f"{what['commit']} on {what['count']} {what['name']} ({what['device']}), torch "
        f"{what['torch']}, CUDA {what['cuda']}, Python {what['python']}.{pretend}",
        "",
        "| step | what must hold | result | | seconds |",
        "|---|---|---|---|---|",
    ]
    holds = {step.name: step.holds for step in STEPS}
    waiting = {"holds": "", "result": "not run yet", "said": "", "seconds": ""}
    for name in dict.fromkeys([*holds, *found]):
        one = found.get(name, {**waiting, "holds": holds.get(name, "")})
        result = one["result"].replace("failed", "**FAILED**")
        said = one["said"].replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name} | {one['holds']} | {result} | {said} | {one['seconds']} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "mps", "cpu"))
    parser.add_argument("--short", action="store_true", help="small sizes: a few minutes")
    parser.add_argument("--afresh", action="store_true", help="forget the results there are")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all steps together")
    parser.add_argument("--only", nargs="+", metavar="STEP", help=", ".join(s.name for s in STEPS))
    parser.add_argument("--out", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    names = arguments.only or [step.name for step in STEPS]
    if unknown := set(names) - {step.name for step in STEPS}:
        parser.error(f"no step {', '.join(sorted(unknown))}")
    if not counts()[arguments.device]:
        print(f"no {arguments.device} here; see --help for the pretend device", file=sys.stderr)
        return 2
    setting = Setting(arguments.device, arguments.short, "")
    aside = ROOT / "build" / "gpu" / (setting.device + "-short" * setting.short)
    is_result = setting.has_times and not setting.short
    out = arguments.out or (ROOT / "benchmarks" / "results" if is_result else aside)
    setting = replace(setting, folder=str(aside / "work"))
    chosen = [step for step in STEPS if step.name in names]
    seconds = 60 * arguments.minutes
    result = run_all(chosen, setting, out, seconds=seconds, afresh=arguments.afresh)
    print(out / "gpu.md")
    return int(any(one["result"] == "failed" for one in result["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
