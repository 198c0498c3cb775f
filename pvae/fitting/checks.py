"""What `fit` refuses before it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import nn

from pvae import randomness
from pvae import terms as t
from pvae.data import Source
from pvae.data.sources import LoaderSource
from pvae.errors import ArgumentError, PairError, PvaeWarning, oxford

__all__ = ["check_batches", "check_parameters"]


def check_batches(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    structure: t.Structure,
    source: Source,
    batch_size: int,
) -> None:
    """Refuses batches that the pair can't be trained on, or would be wrongly trained on."""
    if isinstance(source, LoaderSource) or structure.subsample_size is not None:
        return
    is_part = batch_size < source.num_rows
    if is_part:
        _check_minibatches(guide, structure, source.num_rows, batch_size)
    if batch_size == 1 or (is_part and source.num_rows % batch_size == 1):
        _check_one_row(model, guide, structure, source, batch_size)


def _check_minibatches(
    guide: Callable[..., Any], structure: t.Structure, num_rows: int, batch_size: int
) -> None:
    if structure.tied_to is not None:
        per_row = isinstance(poutine.unwrap(guide), AutoGuide) and structure.latents
        if per_row or num_rows % batch_size:
            raise PairError(
                "batch_size",
                f"all {num_rows} rows in one batch: the pair runs on {structure.tied_to} rows and "
                "on no other number",
                f"batches of {batch_size}",
                [
                    "batch_size=None",
                    "pyro.plate(name, N, subsample_size=...) in the pair, which picks its rows",
                ],
            )
        warnings.warn(
            f"The pair runs on batches of {structure.tied_to} rows and on no others. If it has "
            "parameters of its own for each row, other rows will share them: batch_size=None.",
            PvaeWarning,
            stacklevel=6,
        )
    if structure.global_sites and not structure.is_scaled:
        shared = oxford(structure.global_sites[:4])
        advice = (
            f"In batches of {batch_size} of {num_rows} rows they would count once a batch, as if "
            "each batch were the whole data set"
        )
        if structure.global_latents:
            raise PairError(
                f"global site(s) {shared}",
                "a data plate that knows the full size",
                f"pyro.plate('{structure.plate}', len(x)). {advice}",
                [
                    f"pyro.plate('{structure.plate}', {num_rows}, subsample_size=len(x)) in model "
                    "and guide",
                    "batch_size=None",
                ],
            )
        warnings.warn(
            f"Site(s) {shared} are outside the data plate. {advice}. "
            f"pyro.plate('{structure.plate}', {num_rows}, subsample_size=len(x)) counts them once.",
            PvaeWarning,
            stacklevel=6,
        )


def _check_one_row(
    model: Any, guide: Any, structure: t.Structure, source: Source, batch_size: int
) -> None:
    """Tries a batch of one row in training mode, which batch norm may refuse."""
    norms = [m for m in structure.modules if isinstance(m, nn.modules.batchnorm._NormBase)]
    if not norms:
        return
    kept = [(b, b.clone()) for m in norms for b in m.buffers(recurse=False)]
    modes = [(m, m.training) for m in structure.modules]
    for module in structure.modules:
        module.training = True
    try:
        with randomness.forked(), torch.no_grad():
            t.run_pair(model, guide, t.first_batch(source, 1))
    except PairError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ArgumentError(
            "batch_size",
            "every batch with at least two rows, as batch norm needs in training",
            f"{source.num_rows} rows in batches of {batch_size}: the last one has a single row",
            [f"batch_size={batch_size + 1}", "one row fewer"],
        ) from error
    finally:
        for buffer, copy in kept:
            buffer.copy_(copy)
        for module, training in modes:
            module.training = training


def check_parameters(structure: t.Structure) -> None:
    """Refuses a pair with nothing to train; warns of networks that won't be."""
    if structure.unannounced:
        warnings.warn(
            f"{oxford(structure.unannounced[:4])} are used by the pair but not announced, so they "
            "won't be trained. Call pyro.module(name, network) in the function, or make the model "
            "or guide a module that holds the network.",
            PvaeWarning,
            stacklevel=4,
        )
    if not structure.parameters:
        raise PairError(
            "pair",
            "at least one trainable parameter",
            "none",
            ["pyro.param or pyro.module in a function", "nn.Parameter in a module"],
        )
