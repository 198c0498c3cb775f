"""Steps that train: from a memory map, killed and resumed, of two shapes, by two processes."""

from __future__ import annotations

import gc
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import torch

from gpu_steps.common import (
    Outcome,
    Setting,
    build,
    failed,
    fit,
    images,
    judged,
    left_out,
    python,
    relative,
)
from pvae import checkpoint

MIB = 2**20


def resident() -> int:
    """Bytes of the host's memory that this process has; 0 where that isn't known."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * 4096 if pages.exists() else 0


def allocated(device: str) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def memory_map(setting: Setting) -> Outcome:
    """Twenty trainings on one memory map: the same numbers, and no more memory from run to run."""
    path = Path(setting.folder) / "images.npy"
    np.save(path, images(setting.pick(4096, 384)))
    x = np.load(path, mmap_mode="r")
    engine = "cudagraph" if setting.device == "cuda" else "eager"
    losses, device_memory, host_memory = [], [], []
    for _ in range(20):
        losses.append(fit(setting, build(), x, engine=engine).history["loss"])
        device_memory.append(allocated(setting.device))
        host_memory.append(resident())
    same = all(loss == losses[0] for loss in losses)
    on_device = (device_memory[-1] - device_memory[1]) / MIB
    on_host = (host_memory[-1] - host_memory[4]) / MIB
    said = (
        f"20 trainings, {engine}: losses {'the same' if same else 'that differ'}; from the second "
        f"on {on_device:+.1f} MiB on the device, from the fifth on {on_host:+.0f} MiB on the host"
    )
    good = same and on_device <= 1 and on_host <= 64
    return judged(good, said, device=device_memory, host=host_memory)


def _train(folder: Path, setting: Setting, kill_at: int = 0) -> int:
    """Trains convolutions in a process of its own, killed as a step starts; how that ended."""
    command = ["-m", "gpu_steps.convolutions", str(folder), setting.device, str(kill_at)]
    return python(setting, *command).returncode


def kill_and_resume(setting: Setting) -> Outcome:
    """Convolutions, killed twice and resumed, beside those that were left alone."""
    from safetensors.torch import load_file

    whole, killed = (Path(setting.folder) / name for name in ("whole", "killed"))
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    ended = [_train(whole, setting), *(_train(killed, setting, at) for at in (11, 6, 0))]
    if ended != [0, -signal.SIGKILL, -signal.SIGKILL, 0]:
        return failed(f"the runs ended with {ended}")
    first, second = (load_file(folder / "final.safetensors") for folder in (whole, killed))
    off = max(float((first[name] - second[name]).abs().max()) for name in first)
    environment = checkpoint.load(killed / "checkpoint.safetensors").meta["environment"]
    known = {name: v for name, v in environment.items() if name.startswith("float32_")}
    said = ", ".join(f"{name} {value}" for name, value in known.items())
    return judged(
        off == 0.0 and set(known) >= {"float32_matmul", "float32_conv"},
        f"parameters after two kills off by {off:g}; the checkpoint has {said}",
        off=off,
        **known,
    )


def two_shapes(setting: Setting) -> Outcome:
    """The memory of a training whose last batch is smaller, beside one without such a batch."""
    if setting.device != "cuda":
        return left_out("graphs, and their memory, are CUDA's")
    batch = setting.pick(4096, 256)
    peaks = []
    for rows in (2 * batch, 2 * batch + batch // 2):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        x = torch.from_numpy(images(rows)).to(setting.device)
        before = torch.cuda.memory_allocated()
        fit(setting, build(), x, engine="cudagraph", batch_size=batch, epochs=5)
        peaks.append(torch.cuda.max_memory_reserved() - before)
        del x
    one, two = (peak / MIB for peak in peaks)
    said = f"{one:.0f} MiB with batches of one shape, {two:.0f} MiB with two"
    return judged(two <= 1.5 * one + 2, f"{said}: {two / max(one, 1e-9):.2f} times", peaks=peaks)


def two_gpus(setting: Setting) -> Outcome:
    """Two processes beside one, on a pair without draws: the same losses."""
    count = torch.cuda.device_count() if setting.device == "cuda" else 0
    if count < 2 and setting.device != "cpu":
        return left_out(f"{count} GPU(s); it takes two")
    settings = ["--data", "digits", "--recipe", "ae", "--epochs", "3", "--overwrite"]
    command = ["-m", "pvae", "train", *settings, "--device", setting.device, "--out"]
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    losses = []
    for name, start in (("one", []), ("two", run)):
        folder = Path(setting.folder) / f"{name}-process"
        done = python(setting, *start, *command, str(folder))
        if done.returncode:
            return failed(f"{name}: {done.stdout.strip()[-200:]}")
        lines = (folder / "history.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    off = relative(losses[1], losses[0])
    backend = "NCCL" if setting.device == "cuda" else "gloo"
    return judged(off < 1e-3, f"losses of two processes ({backend}) off by {off:.1e}", off=off)
