"""Builds the library of the pretend device, once for each torch and source."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "pretend"
WAITS = {"dynamic_output_shape", "data_dependent_output"}
ALSO_WAIT = {
    "aten::normal.Tensor_Tensor",  # each looks whether all scales are positive
    "aten::normal.float_Tensor",
    "aten::_linalg_eigh",
    "aten::_linalg_svd",
    "aten::histc",
}


class UnavailableError(RuntimeError):
    """Why there can't be a pretend device here."""


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(f"there is no package {name}")
    return Path(spec.submodule_search_locations[0])


def library() -> Path:
    """Path of the library, which is built if there is none.

    Raises:
        UnavailableError: With the reason, where it can't be built.
    """
    if sys.platform != "linux":
        raise UnavailableError(f"the pretend device is built on Linux, not {sys.platform}")
    if built_for_a_device():
        raise UnavailableError("torch is built for a GPU; the pretend device needs its CPU build")
    key = hashlib.sha256((HERE / "device.cpp").read_bytes()).hexdigest()[:12]
    path = BUILD / f"{importlib.metadata.version('torch')}-{key}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            compile_to(path)
    return path


def built_for_a_device() -> bool:
    """Whether torch has kernels of its own for a GPU, told without importing it."""
    text = (package("torch") / "version.py").read_text()
    return re.search(r"^(cuda|hip|xpu)\b.*= '", text, re.M) is not None


def compile_to(path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise UnavailableError("the pretend device is built with g++, and there is none")
    torch = package("torch")
    half = path.with_suffix(".half")
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-DAT_PER_OPERATOR_HEADERS"]
    for include in (torch / "include", torch / "include/torch/csrc/api/include"):
        command += ["-isystem", str(include)]
    command += [str(HERE / "device.cpp"), "-o", str(half), f"-L{torch / 'lib'}"]
    command += ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"{compiler} can't build the pretend device:\n{done.stderr[-2000:]}")
    half.rename(path)


def operations() -> tuple[set[str], set[str]]:
    """Those that take numbers as tensors of the host, and those that wait, by torch's own table."""
    host_scalars, wait, structured, delegates = set(), set(ALSO_WAIT), set(), {}
    for name, text in entries():
        if "device_check: NoCheck" in text:
            host_scalars.add(name)
        if "structured_inherits: TensorIteratorBase" in text:
            structured.add(name)
        if delegate := re.search(r"structured_delegate: (\S+)", text):
            delegates[name] = f"aten::{delegate[1]}"
        if tags := re.search(r"^  tags: (.*)", text, re.M):
            wait |= {name} if WAITS & set(re.findall(r"\w+", tags[1])) else set()
    host_scalars |= structured | {name for name, to in delegates.items() if to in structured}
    return host_scalars, wait


def entries() -> Iterator[tuple[str, str]]:
    table = package("torchgen") / "packaged/ATen/native/native_functions.yaml"
    for entry in re.split(r"^- func: ", table.read_text(), flags=re.M)[1:]:
        yield f"aten::{entry.partition('(')[0]}", entry
