"""A training that kills itself: python -m gpu_steps.convolutions FOLDER DEVICE STEP.

It does so, with SIGKILL, as that step from its start begins; with 0 for a step it goes on to its
end, and writes what that is to FOLDER/final.safetensors.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import pvae
from gpu_steps.common import build, images


def main(folder: Path, device: str, kill_at: int) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True  # without it convolutions add up in any order
    pair, steps = build("conv"), itertools.count(1)

    def count(module: nn.Module, _: object) -> None:
        if module.training and next(steps) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    pair.guide.register_forward_pre_hook(count)
    x = images(256).reshape(-1, 1, 28, 28)
    pvae.fit(
        pair,
        x,
        epochs=3,
        batch_size=32,
        device=device,
        engine="eager",
        folder=folder,
        resume=True,
        save_steps=2,
        progress=False,
    )
    state = {name: value.cpu().contiguous() for name, value in pair.state_dict().items()}
    save_file(state, folder / "final.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
