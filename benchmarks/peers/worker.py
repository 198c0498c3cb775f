"""One side of the throughput benchmark, in a process of its own.

Started as ``python -m peers.worker JSON``; says what it is, then answers each line
``{"steps": n}`` with the seconds that n steps took, and ``{"split": n}`` with where their time
went (torch alone). This file and `common` import numpy alone, so
that a side needs nothing but its own library.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

from peers.common import Case, Side


def make(spec: dict[str, Any]) -> Side:
    if spec["core"] is not None:
        os.sched_setaffinity(0, {spec["core"]})
    side: Side = importlib.import_module(f"peers.{spec['module']}").make(
        Case(**spec["case"]), spec["option"]
    )
    return side


def measure(side: Side, steps: int) -> dict[str, float]:
    cpu, started = time.process_time(), time.perf_counter()
    loss = side.run(steps)
    return {
        "seconds": time.perf_counter() - started,
        "cpu seconds": time.process_time() - cpu,
        "loss": loss,
    }


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply

    def reply(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=replies, flush=True)

    try:
        side = make(json.loads(sys.argv[1]))
        versions = {name: version(name) for name in side.packages}
        reply({"parameters": side.parameters, "versions": versions})
        for line in sys.stdin:
            asked = json.loads(line)
            if "split" in asked:
                from peers.split import split  # torch's profiler

                reply(split(side, asked["split"]))
            else:
                reply(measure(side, asked["steps"]))
    except Exception as error:
        first, *_ = str(error).strip().splitlines() or [""]
        reply({"error": f"{type(error).__name__}: {first}"})
        raise


if __name__ == "__main__":
    main()
