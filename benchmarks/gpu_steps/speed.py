"""Steps that ask for the time: throughput beside others, an epoch, Burda's schedule."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from objectives import build as build_tanh

from gpu_steps.common import Outcome, Setting, build, failed, fit, images, judged, left_out
from pvae import bounds, data
from pvae import objectives as o
from pvae.errors import DataError
from pvae.schedules import Schedule

BATCH = 128
AGAINST_PYRO, AGAINST_CAPTURED, EPOCH = 5.0, 0.9, 0.15


def throughput(setting: Setting) -> Outcome:
    """Time of a step beside hand-written torch, a graph captured by hand, and Pyro's SVI."""
    import throughput as t
    from peers.common import Case

    case = Case("mlp", BATCH, rows=setting.pick(468, 4) * BATCH, epochs=1, device=setting.device)
    names = [t.EAGER, t.FUSED, t.PYRO]
    if setting.device == "cuda":
        names += [t.CUDAGRAPH, t.CAPTURED]
    result = t.measure(case, setting.pick(5, 1), 1, None, names)
    sides = {name: side["ms"] for name, side in result["sides"].items()}
    missing = {name: why for name, why in result["left out"].items() if name in names}
    said = [f"{name} {ms:.3f} ms" for name, ms in sides.items()]
    said += [f"{name} left out: {why}" for name, why in missing.items()]
    if missing:
        return failed("; ".join(said), **result)
    ours = min(sides[name] for name in (t.EAGER, t.CUDAGRAPH) if name in sides)
    bars = {f"{AGAINST_PYRO:g}x Pyro SVI": (sides[t.PYRO] / ours, AGAINST_PYRO)}
    if t.CAPTURED in sides:
        bars[f"{AGAINST_CAPTURED:g} of the hand-captured graph"] = (
            sides[t.CAPTURED] / ours,
            AGAINST_CAPTURED,
        )
    if not setting.has_times:
        return left_out("; ".join(["times mean nothing here", *said]), **result)
    verdicts = {name: ratio >= bar for name, (ratio, bar) in bars.items()}
    words = {True: "met", False: "NOT met"}
    said += [f"bar {n}: {bars[n][0]:.2f}, {words[met]}" for n, met in verdicts.items()]
    return judged(all(verdicts.values()), "; ".join(said), **result)


def epoch(setting: Setting) -> Outcome:
    """Seconds of an epoch of as many images as MNIST has, as `pvae.fit` takes them."""
    x = images(setting.pick(60000, 1024))
    engine = "cudagraph" if setting.device == "cuda" else "eager"
    run = fit(setting, build(), x, epochs=2, batch_size=BATCH, engine=engine)
    seconds = []
    for _ in range(setting.pick(5, 1)):
        started = time.perf_counter()
        run.refine(1)
        seconds.append(time.perf_counter() - started)
    least = min(seconds)
    said = f"{least:.3f} s for {len(x)} images, {engine}; the bar is {EPOCH} s"
    if not setting.has_times:
        return left_out(f"times mean nothing here: {said}", seconds=seconds)
    met = "met" if least < EPOCH else "NOT met"
    return judged(least < EPOCH, f"{said}, {met}", seconds=seconds)


@dataclasses.dataclass(frozen=True)
class Burda(Schedule):
    """The learning rate of Burda et al. (2016): stage i has 3^i epochs at 10^(-i / 7)."""

    steps_per_epoch: int = 1

    def __call__(self, step: int) -> float:
        return 10 ** (-stage_of(step // self.steps_per_epoch) / 7)

    def resolve(self, steps_per_epoch: int, total_steps: int) -> Schedule:
        return dataclasses.replace(self, steps_per_epoch=steps_per_epoch)


STAGES = [sum(3**j for j in range(i + 1)) for i in range(8)]  # epochs until each one's end
PUBLISHED = -85.54  # IWAE with five draws, their Table 1


def stage_of(epoch: int) -> int:
    return next((i for i, end in enumerate(STAGES) if epoch < end), len(STAGES) - 1)


def digits_of(setting: Setting) -> tuple[str, Any, Any]:
    """MNIST if PVAE_DATA has it, or else made images: a name, training data, test data."""
    try:
        splits = data.load("mnist", None, valid=0)
    except DataError:
        x = images(setting.pick(20000, 400))
        return "made images, as PVAE_DATA names no MNIST", x[:-200], x[-200:]
    train = data.Data(splits.train.arrays[:1], 1 / 255, binarize="dynamic").reshape((784,))
    test = data.Data(splits.test.arrays[:1], 1 / 255, binarize="static", seed=1).reshape((784,))
    return "MNIST", train, np.asarray(test.take(slice(1000)).fixed().arrays[0])


def schedule(setting: Setting) -> Outcome:
    """IWAE-5 along Burda's schedule for as long as there is time; a second call goes on.

    The evidence of the test data must rise from the end of a stage to that of the next.
    """
    started, folder = time.perf_counter(), Path(setting.folder) / "schedule"
    name, train, test = digits_of(setting)
    pair, file = build_tanh(), folder / "evidence.json"
    found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    stages, epochs = STAGES[: setting.pick(len(STAGES), 3)], 0
    for end in (end for end in stages if str(end) not in found):
        while epochs < end and time.perf_counter() - started < 0.7 * setting.seconds:
            epochs = _train(setting, pair, train, folder, min(end, epochs + 9))
        if epochs < end:
            break
        found[str(end)] = bounds.evidence(pair, test, setting.pick(1000, 50)).mean
        file.write_text(json.dumps(found))
    values, is_whole = list(found.values()), str(STAGES[-1]) in found
    holds = bool(values) and all(a < b for a, b in itertools.pairwise(values))
    if name == "MNIST" and is_whole:
        holds &= values[-1] > PUBLISHED - 1
    said = ", ".join(f"{value:.2f} after {end}" for end, value in found.items()) or "none yet"
    text = f"{name}: stages {len(found)} of {len(STAGES)}, evidence after epochs: {said}"
    outcome = judged(holds, f"{text}; published {PUBLISHED} after {STAGES[-1]}", evidence=found)
    return dataclasses.replace(outcome, unfinished=not is_whole and not setting.short)


def _train(setting: Setting, pair: object, train: object, folder: Path, epochs: int) -> int:
    """Trains from where the folder's checkpoint is, up to so many epochs; how many there are."""
    run = fit(
        setting,
        pair,
        train,
        objective=o.IWAE(5),
        epochs=epochs,
        batch_size=20,
        optimizer=functools.partial(torch.optim.Adam, eps=1e-4),
        lr_schedule=Burda(),
        engine="cudagraph" if setting.device == "cuda" else "eager",
        folder=folder,
        resume=True,
    )
    return run.progress.epoch
