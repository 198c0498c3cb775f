"""Steps that ask whether numbers are right: tests, the README, engines, waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from torch import Tensor

import pvae
from gpu_steps.common import (
    PIXELS,
    Outcome,
    Setting,
    adam,
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
from pvae import objectives as o
from pvae import recipes
from pvae.engine import Stepper, make_optimizer


def doctor(setting: Setting) -> Outcome:
    done = python(setting, "-m", "pvae", "doctor")
    lines = [line.strip() for line in done.stdout.splitlines()]
    found = [line for line in lines if line.startswith(f"{setting.device}:")]
    if setting.device == "cpu":
        found = [line for line in lines if line.startswith("torch ")]
    good = done.returncode == 0 and found and "no known trouble" in lines
    return judged(bool(good), "; ".join([*found, lines[-1] if lines else "nothing was said"]))


def engine_tests(setting: Setting) -> Outcome:
    files = ["tests/test_engine.py", "tests/test_captured.py"]
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


OBJECTIVES: dict[str, Callable[[], o.Objective]] = {
    "ELBO": o.ELBO,
    "ELBO, closed form": lambda: o.ELBO(analytic_kl=True),
    "IWAE": lambda: o.IWAE(5),
    "DReG": lambda: o.DReG(5),
    "STL": o.STL,
    "Renyi": lambda: o.Renyi(5, alpha=0.5),
    "VIMCO": lambda: o.VIMCO(5),
    "RWS": lambda: o.RWS(5),
    "TVO": lambda: o.TVO(5),
    "CUBO": lambda: o.CUBO(5),
    "FreeBits": lambda: o.FreeBits(floor=0.1),
    "Capacity": lambda: o.Capacity(capacity=2.0),
    "GECO": lambda: o.GECO(tolerance=1.0),
    "DIPVAE": o.DIPVAE,
    "TCVAE": o.TCVAE,
    "InfoVAE": o.InfoVAE,
    "FactorVAE": o.FactorVAE,
}
RECIPES = ("ae", "sparse_activations_ae", "contractive_ae", "denoising_ae", "rae", "wae")


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Raises at whatever waits for CUDA."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(setting: Setting) -> Outcome:
    """Objectives, and recipes with their penalties, whose step waits for the device."""
    if setting.device != "cuda":
        return left_out("only CUDA says where it waits")
    x = torch.from_numpy(images(64)).to(setting.device)
    pairs: dict[str, tuple[pvae.VAE, Callable[[], o.Objective]]] = {
        name: (build(), make) for name, make in OBJECTIVES.items()
    }
    for name in RECIPES:
        pairs[name] = (recipes.named(name)(PIXELS, 20, hidden=(40,)), o.ELBO)
    waiting: dict[str, str] = {}
    for name, (pair, make) in pairs.items():
        try:
            _steps(pair.to(setting.device), make(), x)
        except Exception as error:
            waiting[name] = str(error.__cause__ or error).strip().partition("\n")[0]
    said = "; ".join(f"{name}: {why[:80]}" for name, why in waiting.items()) or "none"
    return judged(not waiting, f"of {len(pairs)}, waiting: {said}", waiting=waiting)


def _steps(pair: pvae.VAE, objective: o.Objective, x: Tensor) -> None:
    structure = pair.inspect((x,))
    optimizer = make_optimizer(adam, list(structure.parameters.values()))
    state = objective.make_state(structure, len(x), 1, 10)
    stepper = Stepper(structure, objective, optimizer, state)
    with pyro.validation_enabled(is_validate=False):  # as in a training
        stepper((x,), 0)  # in which states are made
        with no_waits():
            for step in range(1, 4):
                stepper((x,), step)


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
