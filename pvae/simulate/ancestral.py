"""Ancestral sampling: one run of a model, site after site, with its data drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypedDict, Unpack, get_args

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvae import randomness
from pvae.distributions import base_of
from pvae.errors import UndefinedError, check_choice, oxford
from pvae.modes import evaluating
from pvae.pair import (
    Batch,
    Observed,
    Structure,
    is_inside,
    mask_of,
    rows_to,
    run_pair,
)
from pvae.pair.messages import is_factor, is_penalty, sample_sites
from pvae.pair.observed import DATA, observed_sites, put_back
from pvae.simulate.settling import Settled, settle
from pvae.terms import Terms, compute, mean_of
from pvae.terms.collect import PARTICLES
from pvae.terms.passes import can_vectorize, in_particles, no_guide
from pvae.types import Dist, Message, Program, Site

__all__ = ["Origin", "Simulation", "require_mean", "require_proper", "run_model", "simulate_batch"]

Origin = Literal["posterior", "prior", "mixed"]
"""Where latents come from: all from the guide; all from the model; those outside the data plate
from the guide, and those of data from the model given these."""

WHERE = "draws of data"

FEEDS = "feeds"
"""Key in the notes of a structure whose model reads, at one site, the data of another."""


class RunOptions(TypedDict, total=False):
    """How `run_model` runs a model."""

    where: str  # the tool, for error messages; "draws of data"
    draw_data: bool  # whether data are drawn, and not only latents; True
    mean: bool  # whether data are their distributions' means in place of draws; False
    keep_masked: bool  # whether entries that are masked out are the observed ones; True


class _DrawData(Messenger):
    """Draws what a model observes from its distribution, or sets it to the distribution's mean."""

    def __init__(self, options: RunOptions) -> None:
        super().__init__()
        self.mean = options.get("mean", False)
        self.keep_masked = options.get("keep_masked", True)

    def _pyro_sample(self, msg: Message) -> None:
        if not msg["is_observed"] or is_factor(msg):
            return
        value, data = self._value(msg), msg["value"]
        mask = mask_of(msg) if self.keep_masked else None
        if mask is not None:
            value = torch.where(mask, value, torch.as_tensor(data).to(value.dtype))
        msg["infer"] = {**(msg["infer"] or {}), DATA: data}
        msg["value"] = value

    def _value(self, msg: Message) -> Tensor:
        fn: Dist = msg["fn"]
        value: Tensor | None = None
        with contextlib.suppress(NotImplementedError):
            value = mean_of(fn) if self.mean else fn(*msg["args"], **msg["kwargs"])
        if value is not None:
            return value
        where, what = f"site '{msg['name']}'", type(fn).__name__
        if self.mean:
            raise UndefinedError(where, "a distribution whose mean is known", what, ["mean=False"])
        raise UndefinedError(where, "one that can draw", what, [".sample() on the distribution"])


def run_model(
    model: Program, batch: Batch, latents: Trace | None = None, **options: Unpack[RunOptions]
) -> Trace:
    """Pyro's trace of one run of a model with its data drawn, each site given those before it.

    Latents of the trace ``latents`` aren't drawn anew. Of what the model observes, only the shape
    matters. Refused if it has factors, or a distribution no mean.
    """
    draws_data = options.get("draw_data", True)
    program = _DrawData(options)(model) if draws_data else model
    program = program if latents is None else poutine.replay(program, trace=latents)
    trace = run_pair(program, no_guide, batch)[1]
    factors = [s["name"] for s in sample_sites(trace) if is_factor(s) and not is_penalty(s)]
    if draws_data and factors:
        raise UndefinedError(
            options.get("where", WHERE),
            "a model without factors, which no draw follows",
            f"factor {oxford(factors)}",
            ["pyro.infer.NUTS on the model"],
        )
    return trace


@dataclass
class Simulation:
    """K draws of latents and data on one batch of N, in one pass or, where looped, one by one."""

    structure: Structure
    batch: Batch  # what the model is called with
    guides: list[Trace | None]  # by pass; None where latents are the model's
    given: Mapping[str, Tensor]  # values of sites that weren't to be drawn
    per_pass: int  # draws that a pass has
    options: RunOptions
    terms: Terms | None = None  # densities of these latents and the batch's own data, if asked for
    num_rows: int | None = None  # N; None until `first_rows` leaves some rows out

    @cached_property
    def traces(self) -> list[Trace]:
        """Of the model with its data drawn, by pass; run when first asked for."""
        if FEEDS in self.structure.notes and self.options.get("draw_data", True):
            ones = [replace(self, guides=[guide], terms=None) for guide in self.guides]
            return [one.settled().trace for one in ones]
        return [self.once(guide) for guide in self.guides]

    def once(self, guide: Trace | None, batch: Batch | None = None) -> Trace:
        """A run of the model, on the batch or another."""
        with evaluating(self.structure.modules):  # traces run when they are first asked for
            return run_model(self.program, batch or self.batch, guide, **self.options)

    @property
    def program(self) -> Program:
        """The model in the plate of particles, with what is given."""
        return in_particles(self.structure.model, self.structure, self.per_pass, self.given)

    @property
    def _first(self) -> Trace:
        return self.traces[0] if self.terms is None else self.terms.passes[0].model_trace

    @property
    def where(self) -> str:
        """The tool, for error messages."""
        return self.options.get("where", WHERE)

    def site(self, name: str) -> Site:
        """A site of the model, as the first pass has it."""
        node: Site = self._first.nodes[name]
        return node

    def value(self, name: str) -> Tensor:
        """Draws of a site, ``(K, N, ...)`` inside the data plate and ``(K, ...)`` outside.

        Data are drawn; latents are those that the data were drawn with.
        """
        if self.terms is not None and name not in self.structure.observed:
            value = self.terms.sites[name].value
            assert value is not None  # noqa: S101
            return value
        nodes = [trace.nodes[name] for trace in self.traces]
        if self.options.get("mean", False) and name in self.structure.observed:
            require_mean(self.where, nodes[0])
        return torch.cat([self._laid_out(node["value"], node) for node in nodes])

    def data(self, name: str) -> Tensor:
        """What an observed site observes, ``(N, ...)`` inside the data plate."""
        site = self.observed[name]
        return site.data if site.axis is None else site.data[: self.num_rows]

    def mask(self, name: str) -> Tensor | None:
        """Which entries of a site count, ``(N, ...)``; None if all do."""
        node = self.site(name)
        mask, rank = mask_of(node), self.structure.nesting + (self.per_pass > 1)
        if mask is None:
            return None
        if (states := mask.dim() - len(node["fn"].event_shape) - rank) > 0:
            mask = mask.flatten(0, states - 1).any(0)  # it counts in some state
        return self._laid_out(mask, node)[0]

    @property
    def observed(self) -> dict[str, Observed]:
        """What the observed sites observe, by name."""
        return observed_sites(self.structure, self._first, self.batch)

    def first_rows(self, count: int) -> None:
        """Keeps the first rows of what is inside the data plate."""
        self.num_rows = count
        if self.terms is not None:
            self.terms.first_rows(count)

    def put_back(self, places: Mapping[str, int] | None = None) -> Batch:
        """The batch with the drawn data, of one draw, in place of what the model observes.

        ``places`` says where in the batch a site's data stand, by its name, where a user knows.
        Refused if some data are no entry of the batch.
        """
        return self.filled(self.traces[0], places)

    def filled(
        self, trace: Trace, places: Mapping[str, int] | None, only: str | None = None
    ) -> Batch:
        """The batch with the data of a trace in it, of all sites or of one."""
        observed = observed_sites(self.structure, trace, self.batch)
        observed = observed if only is None else {only: observed[only]}
        values = {name: trace.nodes[name]["value"] for name in observed}
        return put_back(self.where, observed, values, self.batch, self.structure.axes, places)

    def drawn(self) -> Trace:
        """The model's trace of one draw in which data that feed other data are the drawn ones.

        What is no entry of the batch is taken to feed nothing.
        """
        state = randomness.get_state()
        trace = self.traces[0]
        try:
            self.put_back()
        except UndefinedError:
            return trace
        with randomness.forked():
            randomness.set_state(state)
            return self.settled().trace

    def settled(self, places: Mapping[str, int] | None = None) -> Settled:
        """One draw of data, in the batch that the model has read when it drew them.

        Raises:
            UndefinedError: As `pvae.simulate.settling.settle` says.
        """
        return settle(self, places)

    def _laid_out(self, value: Tensor, site: Site) -> Tensor:
        """A value as the programs have it, particles first and then data."""
        fn = site["fn"]
        frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
        own = max((-f.dim for f in frames), default=0)
        batch = value.shape[: value.dim() - len(fn.event_shape)]
        plates = batch[max(0, len(batch) - own) :]
        value = value.reshape(self.per_pass, *plates, *fn.event_shape)
        if not is_inside(self.structure, site):
            return value
        return rows_to(1, self.structure.axis_in(1 + own), value)[:, : self.num_rows]


def simulate_batch(
    structure: Structure,
    batch: Batch | Tensor,
    *,
    num_particles: int = 1,
    given: Mapping[str, Tensor] | None = None,
    origin: Origin = "prior",
    score: bool = False,
    **options: Unpack[RunOptions],
) -> Simulation:
    """K draws of latents and data for each row of a batch, by running a pair's model.

    Where data are masked out they are the observed ones, which guides expect there, unless
    ``keep_masked`` is false. Values of sites that are ``given`` aren't
    drawn; under the origin ``"mixed"`` those of the guide have to be. With ``score`` latents from
    the guide come with `Simulation.terms`. A latent with an improper prior isn't drawn from it.
    """
    check_choice("origin", origin, get_args(Origin))
    batch, given = structure.place(batch), dict(given or {})
    at_once = num_particles == 1 or (
        FEEDS not in structure.notes and can_vectorize(structure, batch)
    )
    k = num_particles if at_once else 1
    guides: list[Trace | None] = [None] * (num_particles // k)
    terms: Terms | None = None
    if origin != "posterior":
        require_proper(structure, given)
    elif score:
        vectorize = None if at_once else False
        terms = compute(
            structure, batch, num_particles=num_particles, given=given, vectorize=vectorize
        )
        guides = [one.guide_trace for one in terms.passes]
    else:
        guide = in_particles(structure.guide, structure, k, given)
        guides = [run_pair(structure.model, guide, batch, model_too=False)[0] for _ in guides]
    return Simulation(structure, batch, guides, given, k, options, terms)


def require_mean(where: str, site: Site) -> None:
    """Refuses the means of data that have none, as of classes, which are NaN."""
    value = site["value"]
    if value.is_floating_point() and value.numel() and bool(value.isnan().all()):
        what, expected = type(base_of(site["fn"])).__name__, "a distribution that has a mean"
        raise UndefinedError(f"{where}: site '{site['name']}'", expected, what, ["mean=False"])


def require_proper(structure: Structure, given: Container[str] = ()) -> None:
    """Refuses draws from the model where a prior, of what isn't given, is no distribution."""
    improper = [name for name in structure.improper if name not in given]
    if improper:
        raise UndefinedError(
            f"draws of {oxford(improper)} from the model",
            "a prior that is a distribution",
            "an improper prior",
            [
                "a proper prior, such as priors.StandardNormal",
                "latent.with_prior(pair, latent.fit_density(codes)), an ex-post density",
                "kind='aggregated' or 'posterior', in a predictive check",
            ],
        )
