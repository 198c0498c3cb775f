"""What the lecture says of autoencoders, measured.

    python benchmarks/autoencoders.py PART... [--data digits] [--data-dir DIR] [--work DIR]

Each part writes ``benchmarks/results/autoencoders_<part>_<data>.json``;
``benchmarks/results/autoencoders.md`` is made anew from all of them. Verdicts are computed from the
numbers. Pictures go to docs/images. MNIST (``--data mnist``: 10,000 images, fewer seeds) is
looked for in ``--data-dir`` or the environment's PVAE_DATA.

generative   samples of AE, RAE, WAE and VAE against test data; from AE to VAE; maps of the codes
denoising    noise and lost pixels, beside a median filter, PCA and the plain autoencoder
comparing    precision at 10 of the nearest codes
features     logistic regression on codes, few labels and many; sensitivity of the codes
sparsity     Hoyer's measure against lambda, unit_norm on and off; wavelets at equal sparsity
capacity     codes far below, equal to and above the data's dimension; noise and foreign images
detail       a quarter of the pixels of photographs, beside bicubic and JPEG (no data set needed)
compression  rate and distortion of quantised codes, beside PCA and JPEG
arithmetic   vectors that move one factor of drawn shapes (no data set needed)
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable

import torch
from lecture.arithmetic import arithmetic
from lecture.capacity import capacity
from lecture.common import Bench, load_images, write_page
from lecture.compression import compression
from lecture.detail import detail
from lecture.features import comparing, features
from lecture.generative import generative
from lecture.restoring import denoising
from lecture.sparsity import sparsity

PARTS: dict[str, Callable[[Bench], None]] = {
    part.__name__: part
    for part in (
        generative,
        denoising,
        comparing,
        features,
        sparsity,
        capacity,
        detail,
        compression,
        arithmetic,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="none: the page alone")
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, help="fewer seeds, for a trial")
    parser.add_argument(
        "--work", help="folder of what has been trained and measured, to go on from"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The code has")  # overcomplete ones are meant
    images = load_images(arguments.data, arguments.data_dir)
    for part in arguments.parts:
        started = time.perf_counter()
        bench = Bench(arguments, part, images)
        PARTS[part](bench)
        for claim in bench.claims:
            print({True: "confirmed", False: "NOT CONFIRMED"}[claim["confirmed"]], claim)
        if arguments.seeds:
            sys.stderr.write("a trial: no result is written\n")
        else:
            bench.write(time.perf_counter() - started)
            write_page(list(PARTS))
    if not arguments.parts:
        write_page(list(PARTS))


if __name__ == "__main__":
    main()
