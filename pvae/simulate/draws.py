"""Draws of latents and data together, for a whole data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from pvae.errors import UndefinedError, check_int, oxford
from pvae.modes import evaluating
from pvae.simulate.ancestral import Origin, Simulation, no_guide, require_proper, simulate_batch
from pvae.terms import Evaluation, draw_globals, first_rows, stream
from pvae.terms.passes import can_vectorize

__all__ = ["check_generative", "draws"]


def draws(
    evaluation: Evaluation,
    num_draws: int,
    origin: Origin = "posterior",
    *,
    mean: bool = False,
    score: bool = False,
) -> Iterator[tuple[slice, slice, Simulation]]:
    """S draws for all data, a block of draws after another, in evaluation mode.

    A draw of what is outside the data plate is one for all data, in whatever chunks these come.
    A block has as many draws as fit the evaluation's ``max_rows``, and at least one; its chunks of
    rows follow one another, to the last row.

    Arguments:
        evaluation: The pair and its data, these in `pvae.data.in_memory` if they are a loader's.
        num_draws: S.
        origin: Where latents come from.
        mean: Data are their distributions' means in place of draws.
        score: Whether draws from the guide have `Simulation.terms`.

    Yields:
        The draws and the rows that a chunk has, and these draws.

    Raises:
        UndefinedError: If the model is to draw a latent that has an improper prior.
    """
    check_int("num_draws", num_draws)
    run = partial(simulate_batch, origin=origin, mean=mean, score=score)
    at_once = max(1, min(num_draws, evaluation.max_rows // evaluation.num_rows))
    if at_once > 1:  # the first rows say whether particles can be vectorised
        with evaluating(evaluation.structure.modules):
            can_vectorize(evaluation.structure, first_rows(evaluation))
    done = 0
    while done < num_draws:
        k = min(at_once, num_draws - done)
        given: dict[str, Tensor] = {}
        if evaluation.structure.global_sites:
            given, k = _draw_globals(evaluation, k, origin)
        for rows, simulation in stream(evaluation, k, given, run=run):
            yield slice(done, done + k), rows, simulation
        done += k


def _draw_globals(
    evaluation: Evaluation, num_draws: int, origin: Origin
) -> tuple[dict[str, Tensor], int]:
    """Draws of what is outside the data plate, and how many there are; see `draw_globals`."""
    if origin == "prior":
        require_proper(evaluation.structure)
        structure = replace(evaluation.structure, guide=no_guide, enumerated=())
        evaluation = replace(evaluation, structure=structure)
    given, terms = draw_globals(evaluation, num_draws)
    return given, terms.num_particles


def check_generative(
    what: str, evaluation: Evaluation, origin: Origin = "posterior", *, latents_alone: bool = False
) -> None:
    """Refuses a pair whose sites can't be drawn by drawing each from its distribution.

    That is so where there are factors, which no draw of the model follows; where an enumerated
    latent of the data, which the guide doesn't have, would have to come from its posterior; and
    where an observed site's distribution is fed the data that it scores, as with teacher forcing.

    Arguments:
        what: What is refused.
        evaluation: The pair and its data.
        origin: Where latents come from.
        latents_alone: Whether no data are to be drawn.

    Raises:
        UndefinedError: Naming the site.
    """
    structure = evaluation.structure
    if structure.enumerated and origin == "posterior":
        raise UndefinedError(
            what,
            "a guide for all latents, as draws of data from q(z | x) need",
            f"{oxford(structure.enumerated)}, which the model sums out",
            ["kind='mixed' or 'prior', in which the model draws them", "a guide for them"],
        )
    given, _ = _draw_globals(evaluation, 1, origin) if structure.global_sites else ({}, 1)
    with evaluating(structure.modules):
        batch = first_rows(evaluation)
        first = simulate_batch(structure, batch, origin=origin, given=given, where=what)
        if not first.traces or latents_alone:
            return
        try:
            filled = first.put_back()
        except UndefinedError:  # what is no entry of the batch isn't fed to the model either
            return
        first.check_unfed(filled)
