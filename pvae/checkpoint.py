"""Checkpoints: one safetensors file with a JSON header, written atomically; no pickle anywhere.

The tensors are parameters, buffers, optimiser state, generator states. Everything else, and a
digest of the tensors, is JSON in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

import pvae
from pvae.annotations import strict
from pvae.distributed import current
from pvae.errors import CheckpointError
from pvae.files import write_atomically

__all__ = [
    "Checkpoint",
    "environment",
    "load",
    "optimizer_state",
    "other_versions",
    "restore_optimizer",
    "save",
]

FORMAT = 1


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        tensors: By name; names have a prefix: ``param.``, ``buffer.``, ``best.``, ``optimizer.``,
            ``rng.``.
        meta: What JSON can say.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with ``prefix.``, without it."""
        start = len(prefix) + 1
        return {k[start:]: v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}

    def add(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Adds tensors under ``prefix.``."""
        self.tensors.update({f"{prefix}.{k}": v for k, v in tensors.items()})


@strict
def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint, atomically."""
    from safetensors.torch import save as to_bytes

    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in checkpoint.tensors.items()}
    meta = json.dumps(checkpoint.meta, sort_keys=True)
    header = {"pvae": meta, "pvae_format": str(FORMAT), "pvae_digest": _digest(tensors, meta)}
    write_atomically(Path(path), to_bytes(tensors, metadata=header))


@strict
def load(path: str | Path) -> Checkpoint:
    """Reads a checkpoint, onto the CPU.

    Raises:
        CheckpointError: If the file is missing, cut short, foreign, or has been changed.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)

    def refused(expected: str, actual: str, *fixes: str) -> CheckpointError:
        return CheckpointError(str(path), expected, actual, fixes)

    if not path.is_file():
        raise refused("a checkpoint", "no such file", "pvae train ... first")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        fix = "the file was cut short or is of another kind: take an earlier copy"
        raise refused("a safetensors file", what, fix) from error
    if "pvae" not in header:
        raise refused("a checkpoint that pvae wrote", "a safetensors file of other origin")
    if (number := header.get("pvae_format")) != str(FORMAT):
        fix = "a version of pvae as new as the one that wrote it"
        raise refused(f"format {FORMAT}", f"format {number}", fix)
    if header.get("pvae_digest") != _digest(tensors, header["pvae"]):
        raise refused("content that matches its digest", "changed content", "an earlier copy")
    try:
        return Checkpoint(tensors, json.loads(header["pvae"]))
    except (ValueError, RecursionError) as error:  # of another's making, with a digest of it
        raise refused(
            "content that pvae wrote", "text that is no JSON", "an earlier copy"
        ) from error


def _digest(tensors: Mapping[str, Tensor], meta: str) -> str:
    digest = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, object]:
    """What has to be the same for a resumed training to be the same, bit for bit."""
    is_cuda = device.type == "cuda"
    backends: Any = torch.backends
    others = backends.cudnn if is_cuda else backends.mkldnn
    matmul = backends.cuda.matmul if is_cuda else others.matmul
    return {
        "pvae": pvae.__version__,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device.type,
        "cuda": torch.cuda.get_device_name(device) if is_cuda else None,
        "threads": torch.get_num_threads(),
        "processes": current().size,
        "float32_matmul": _precision(matmul),
        "float32_conv": _precision(others.conv),
        "float32_rnn": _precision(others.rnn),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _precision(operations: Any) -> str:
    """What float32 is computed in: ``"ieee"``, ``"tf32"`` or ``"bf16"``.

    Torch's older settings, such as ``allow_tf32``, show here, too; reading them fails where both
    kinds have been set.
    """
    precision: str = operations.fp32_precision
    return "ieee" if precision == "none" else precision


def other_versions(saved: Checkpoint) -> list[str]:
    """Which versions have changed since a checkpoint was written, in words."""
    then, now = saved.meta["environment"], environment(torch.device("cpu"))
    names = [name for name in ("pvae", "torch", "pyro", "python") if then.get(name) != now[name]]
    return [f"{name} was {then.get(name)}, is {now[name]}" for name in names]


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors, ``<parameter's number>.<name>``, and as JSON."""
    state = optimizer.state_dict()
    tensors, rest = {}, {}
    for number, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                rest[f"{number}.{name}"] = value
    groups = [
        {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"groups": groups, "state": rest}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Puts back what `optimizer_state` returned, but how the machine computes it."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["state"].items()]:
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    groups = []
    for saved, now in zip(rest["groups"], optimizer.state_dict()["param_groups"], strict=True):
        own = {k: now[k] for k in ("fused", "foreach", "capturable") if k in now}
        as_it_was = {k: tuple(v) if isinstance(now.get(k), tuple) else v for k, v in saved.items()}
        groups.append(as_it_was | own)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
