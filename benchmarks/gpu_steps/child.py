"""One step, in a process of its own: python -m gpu_steps.child MODULE:FUNCTION SETTING FILE.

SETTING is JSON; the outcome is written to FILE, as JSON. It ends, with all that it has started,
when the process that started it ends.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from gpu_steps.common import Outcome, Setting


def run(target: str, setting: Setting) -> Outcome:
    module, _, function = target.partition(":")
    try:
        outcome: Outcome = getattr(importlib.import_module(module), function)(setting)
    except Exception as error:
        traceback.print_exc()
        first, *_ = str(error).strip().splitlines() or [""]
        return Outcome("failed", f"{type(error).__name__}: {first}")
    return outcome


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    target, given, file = sys.argv[1:]
    outcome = run(target, Setting(**json.loads(given)))
    Path(file).write_text(json.dumps(asdict(outcome)))
