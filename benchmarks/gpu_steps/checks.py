"""Steps that ask whether numbers are right: tests, the README, engines, waits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pvae
from gpu_steps.common import (
    Outcome,
    Setting,
    build,
    fit,
    images,
    judged,
    left_out,
    python,
    relative,
    tests,
    told,
)


def doctor(setting: Setting) -> Outcome:
    done = python(setting, "-m", "pvae", "doctor")
    lines = [line.strip() for line in done.stdout.splitlines()]
    found = [line for line in lines if line.startswith(f"{setting.device}:")]
    if setting.device == "cpu":
        found = [line for line in lines if line.startswith("torch ")]
    good = done.returncode == 0 and found and "no known trouble" in lines
    return judged(bool(good), "; ".join([*found, lines[-1] if lines else "nothing was said"]))


def engine_tests(setting: Setting) -> Outcome:
    files = ["tests/test_engine.py", "tests/test_captured.py", "tests/test_graphs.py"]
    more = ["tests/test_svi.py", "tests/test_compiled.py", "tests/test_devices.py"]
    chosen = files if setting.short else [*files, *more]
    return tests(setting, "--device", setting.device, *chosen)


def readme(setting: Setting) -> Outcome:
    which = ["tests/test_readme.py"] if not setting.short else ["tests/test_readme.py::" + _FIRST]
    return tests(setting, *which)


_FIRST = "test_the_examples_run"


def suite(setting: Setting) -> Outcome:
    if setting.short:
        files = ["tests/test_terms.py", "tests/test_rows.py", "tests/test_states.py"]
        return tests(setting, "--device", setting.device, "-m", "not slow", *files)
    spread = ["--numprocesses", "4", "--dist", "worksteal"]
    return tests(setting, "--device", setting.device, "-m", "not slow", *spread, "tests")


class Reading(pvae.Guide):
    """A guide that reads a value at each step, as no graph can."""

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        shift = 0.0 if float(x.mean()) < 2 else 1.0
        return super().forward(x + shift, *context)


def fallback(setting: Setting) -> Outcome:
    """A pair that can't be captured: said once, then 100 steps as Python; others still can be."""
    if setting.device != "cuda":
        return left_out("graphs are CUDA's")
    x, batch = images(1600), 16  # 100 steps

    def run(engine: str) -> pvae.Fit:
        pair = build()
        pair.guide.__class__ = Reading
        return fit(setting, pair, x, engine=engine, batch_size=batch)

    expected = run("eager")
    with told() as texts:
        tried = run("cudagraph")
        after = fit(setting, build(), x, engine="cudagraph", batch_size=batch)
    difference = relative(tried.history["loss"], expected.history["loss"])
    captured = after.training.stepper.engine
    draws = torch.rand(8, device=setting.device)
    good = [
        len(texts) == 1,
        difference < 1e-4,
        captured == "cudagraph",
        bool(draws.unique().numel() == 8),
    ]
    said = (
        f"{len(texts)} warning(s): {'; '.join(t[:80] for t in texts)}; loss off by {difference:.1e}"
    )
    return judged(all(good), f"{said}; the next pair's steps: {captured}", good=good)


def waits(setting: Setting) -> Outcome:
    """A step of every objective, penalty, optimiser, part and recipe."""
    if setting.device != "cuda":
        return left_out("only CUDA says where it waits")
    return tests(setting, "--device", setting.device, "tests/test_waits.py")


def engines(setting: Setting) -> Outcome:
    """Compiled, captured and bfloat16 steps beside eager ones."""
    x = images(setting.pick(8192, 512))
    kinds: dict[str, dict[str, Any]] = {
        "eager": {"engine": "eager"},
        "cudagraph": {"engine": "cudagraph"},
        "compiled": {"engine": "compiled"},
        "bf16": {"engine": "eager", "precision": "bf16"},
        "bf16, compiled": {"engine": "compiled", "precision": "bf16"},
    }
    if setting.device != "cuda":
        del kinds["cudagraph"]
    if not setting.has_times and setting.device != "cpu":  # no compiler is for a pretended device
        kinds = {name: k for name, k in kinds.items() if k["engine"] != "compiled"}
    if setting.short:
        kinds.pop("bf16, compiled", None)
    losses, off, wrong = {}, {}, []
    for name, options in kinds.items():
        with told() as texts:
            run = fit(setting, build(), x, epochs=2, **options)
        losses[name] = run.history["loss"]
        off[name] = relative(losses[name], losses["eager"])
        is_narrow = "bf16" in name  # and so isn't the same
        if texts or off[name] > (0.02 if is_narrow else 1e-4) or (is_narrow and not off[name]):
            wrong.append(name)
    said = ", ".join(f"{name} off by {value:.1e}" for name, value in off.items())
    return judged(not wrong, said + (f"; wrong: {', '.join(wrong)}" if wrong else ""), **off)
