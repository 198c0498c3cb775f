"""Runs a command of Python on the pretend device, or on the real one where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.pretend import LOADED
from tests.pretend.build import HERE, UnavailableError, built_for_a_device, library

USAGE = """usage: python -m tests.pretend {cuda,mps} [--] SCRIPT [ARGUMENTS]
       python -m tests.pretend {cuda,mps} [--] -m MODULE [ARGUMENTS]
       python -m tests.pretend {cuda,mps} [--] -c CODE"""
REAL = {"cuda": "torch.cuda.is_available()", "mps": "torch.backends.mps.is_available()"}


def environment(kind: str) -> dict[str, str]:
    """What a process, and all that it starts, needs to be on the pretend device.

    Raises:
        UnavailableError: With the reason, where there can't be one.
    """
    roots = [str(HERE / "site"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        LOADED: f"{kind}:{library()}",
        "PYTHONPATH": os.pathsep.join(filter(None, roots)),
    }


def is_real(kind: str) -> bool:
    if sys.platform == "linux" and not built_for_a_device():
        return False
    code = f"import torch; raise SystemExit(not {REAL[kind]})"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def main(arguments: list[str]) -> int:
    kind, *command = arguments or [""]
    command = command[1:] if command[:1] == ["--"] else command
    if kind not in REAL or not command:
        print(USAGE, file=sys.stderr)
        return 2
    env = dict(os.environ)
    try:
        if is_real(kind):
            print(f"{kind}: the device of this machine", file=sys.stderr)
        else:
            env = environment(kind)
    except UnavailableError as error:
        print(f"no pretend device: {error}", file=sys.stderr)
        return 1
    os.execve(sys.executable, [sys.executable, *command], env)  # noqa: S606
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
