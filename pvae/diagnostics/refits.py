"""Ranks of global latents among draws of guides that are fitted to simulated data, one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pvae.devices import double
from pvae.diagnostics.uniformity import ranked
from pvae.errors import UndefinedError, check_int, oxford
from pvae.internals import copied_guide
from pvae.modes import evaluating, in_mode
from pvae.options import progress_bar
from pvae.pair import Batch, Pair, Structure, only_site
from pvae.simulate import Simulation, flat_values, names_of_dimensions, simulate_batch
from pvae.terms import Evaluation, compute, draw_guide

__all__ = ["Refit", "Refitted", "ranks_of_refits"]

Refit = Callable[[Pair, Batch], object]
"""Fits a pair, whose guide is fresh, to a data set: ``lambda pair, x: pvae.fit(pair, x, ...)``."""


@dataclass(frozen=True)
class Refitted:
    """Ranks of what was drawn among the draws of guides that were fitted to it.

    Attributes:
        ranks: Shape ``(R, D)``, for R simulated data sets.
        names: Of the D entries.
        asked: How many data sets there were to be.
    """

    ranks: Tensor
    names: tuple[str, ...]
    asked: int


def ranks_of_refits(
    evaluation: Evaluation,
    refits: int,
    refit: Refit | None,
    num_particles: int,
    site: str | None,
    arguments: Mapping[str, int] | None,
) -> Refitted:
    """Simulates data sets, fits a fresh guide to each, and ranks the latents that it was made with.

    An interruption ends it early, if there are enough for a test.
    """
    check_int("refits", refits, minimum=FEWEST)
    structure = evaluation.structure
    sites = structure.global_latents if structure.has_plate else structure.latents
    if not sites:
        expected = "latents that all data share, whose guide is one for a data set"
        actual = f"latents of single data, {oxford(structure.latents)}"
        raise UndefinedError("sbc with refits", expected, actual, ["sbc without refits"])
    structure.require_density("sbc with refits", shared=True)
    structure.require_proper("sbc with refits")
    if site is not None:
        sites = (only_site("sbc", "latent that all data share", sites, site),)
    whole = evaluation.as_one_datum() if structure.has_plate else evaluation
    batch = whole.source.rows(torch.zeros(1, dtype=torch.long, device=whole.source.device))
    ranks, names = list[Tensor](), tuple[str, ...]()
    shown = progress_bar(range(refits), title="refits", unit="fit", shown=evaluation.progress)
    with shown, contextlib.suppress(KeyboardInterrupt):
        for _ in shown:
            run, filled = _simulated(whole.structure, batch, arguments)
            names = names or names_of_dimensions(run, sites)
            own = flat_values(run, sites)
            with _fresh(evaluation.pair, whole.structure) as pair:
                drawn = _fitted(pair, filled, refit, sites, num_particles)
            ranks.append(ranked(own, [(slice(0, 1), drawn)]))
    if len(ranks) < FEWEST:
        raise KeyboardInterrupt
    return Refitted(torch.cat(ranks), names, refits)


FEWEST = 10
"""Simulated data sets below which nothing is tested."""


def _simulated(
    structure: Structure, batch: Batch, arguments: Mapping[str, int] | None
) -> tuple[Simulation, Batch]:
    """A data set from the model, and the batch with it."""
    with evaluating(structure.modules):
        run = simulate_batch(structure, batch, where="sbc with refits")
        settled = run.settled(arguments or {})
        run.traces = [settled.trace]
    return run, settled.batch


@contextlib.contextmanager
def _fresh(pair: Pair, structure: Structure) -> Iterator[Pair]:
    """The pair with a guide to be fitted: a module's copy, which an autoguide starts anew.

    All parameters that there were are put back in the end, those of the model too.
    """
    store, guide = pyro.get_param_store(), structure.guide
    state = store.get_state()
    if isinstance(guide, nn.Module):
        own = {id(parameter) for parameter in guide.parameters()}
        for name in [name for name, p in state["params"].items() if id(p) in own]:
            del state["params"][name], state["constraints"][name]  # the copy announces its own
        guide = copied_guide(guide)
        for part in guide.modules():
            if isinstance(part, AutoGuide):
                part.prototype_trace = None
    before = [(p, p.detach().clone()) for p in structure.parameters.values()]
    try:
        with store.scope(state):
            yield Pair(pair.model, guide, plate=pair.plate, densities=pair.densities)
    finally:
        for parameter, value in before:
            parameter.data.copy_(value)


def _fitted(
    pair: Pair, batch: Batch, refit: Refit | None, sites: tuple[str, ...], num_draws: int
) -> Tensor:
    """Draws ``(L, 1, D)`` of the guide, fitted to a data set."""
    if refit is not None:
        refit(pair, batch if len(batch) > 1 else batch[0])
    whole = Pair(pair.model, pair.guide, plate=False, densities=pair.densities)
    structure = whole.inspect(batch)
    if refit is None:
        _ascend(structure, batch)
    with evaluating(structure.modules):
        found = draw_guide(structure, batch, num_particles=num_draws)
    values = [found[name].value for name in sites]
    flat = [double(v.reshape(num_draws, 1, -1)) for v in values if v is not None]
    return torch.cat(flat, 2)


def _ascend(structure: Structure, batch: Batch) -> None:
    """Maximises the ELBO in the guide's parameters, by Adam with a falling learning rate."""
    if drawn := structure.not_reparametrised:
        expected = "latents whose draws have gradients, or refit=, which fits the guide"
        raise UndefinedError("sbc with refits", expected, f"{oxford(drawn)}, which has none")
    sides = structure.sides.items()
    own = [structure.parameters[name] for name, side in sides if "model" not in side]
    if not own:
        raise UndefinedError("sbc with refits", "a guide with parameters", "none")
    optimiser = torch.optim.Adam(own, lr=_LR)
    falling = torch.optim.lr_scheduler.ExponentialLR(optimiser, _FALL ** (1 / _STEPS))
    unchecked = pyro.validation_enabled(is_validate=False)
    with in_mode(structure.modules, training=False), torch.enable_grad(), unchecked:
        for _ in range(_STEPS):
            elbo = compute(structure, batch).log_weight.sum()
            gradients = torch.autograd.grad(-elbo, own, allow_unused=True)
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.nan_to_num(0.0)
            optimiser.step()
            falling.step()
    for parameter in own:
        parameter.grad = None


_STEPS, _LR, _FALL = 1000, 0.1, 0.01
