"""A training of convolutions, to be killed: python -m gpu_steps.convolutions FOLDER DEVICE.

Says ``step`` as each starts, and writes what it ends with to FOLDER/final.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import pvae
from gpu_steps.common import build, images


def main(folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True  # without it convolutions add up in any order
    pair = build("conv")

    def say(module: Any, _: object) -> None:
        if module.training:
            print("step", flush=True)

    pair.guide.register_forward_pre_hook(say)
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
    main(Path(sys.argv[1]), sys.argv[2])
