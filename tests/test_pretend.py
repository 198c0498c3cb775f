"""What runs on the pretend device in each CI run: the tests marked ``device``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import pretend
from tests.pretend.__main__ import environment
from tests.pretend.build import UnavailableError

ROOT = Path(__file__).parents[1]
MARKED = [p for p in sorted(ROOT.glob("tests/test_*.py")) if "mark.device" in p.read_text()]


@pytest.mark.skipif(pretend.kind() is not None, reason="this is the pretend device")
@pytest.mark.parametrize(("kind", "marked"), [("cuda", "device"), ("mps", "device and float32")])
def test_marked(kind: str, marked: str) -> None:
    """In a process of its own, as the device has to be there before torch is imported."""
    try:
        env = environment(kind)
    except UnavailableError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", kind]
    done = subprocess.run(
        [*command, "-m", marked, *map(str, MARKED)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
