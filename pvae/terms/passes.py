"""One traced pass of guide and replayed model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvae import randomness
from pvae.errors import PairError, UndefinedError, check_int, is_out_of_memory, oxford, warn
from pvae.internals import BatchNorm, Norm
from pvae.modes import is_capturing_graph
from pvae.origin import first_line
from pvae.pair import Batch, Structure, is_inside, probing, run_pair
from pvae.pair.masks import OtherMasksError, align_masks, look_at_masks
from pvae.pair.messages import is_factor, sample_sites
from pvae.terms.collect import PARTICLES, Collector
from pvae.terms.result import SiteTerms, Terms, joined, stack
from pvae.terms.states import GuideStates, States
from pvae.types import Message, Program

__all__ = ["can_vectorize", "compute", "draw_guide", "in_particles", "no_guide", "score_guide"]

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


class _Given(Messenger):
    """Sets the values of some sites, expanded over particles where those are vectorised.

    With ``redraw``, sites first draw, which moves the generators on as a run without it does.
    """

    def __init__(self, values: Mapping[str, Tensor], *, redraw: bool = False) -> None:
        super().__init__()
        self.values, self.redraw = values, redraw

    def _pyro_sample(self, msg: Message) -> None:
        value = self.values.get(msg["name"])
        if value is None or msg["is_observed"] or self.redraw:
            return
        inside = any(f.name == PARTICLES for f in msg["cond_indep_stack"])
        if inside and isinstance(msg["fn"], TorchDistributionMixin):
            shape = msg["fn"].batch_shape + msg["fn"].event_shape
            value = value.reshape((1,) * (len(shape) - value.dim()) + value.shape).expand(shape)
        msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Message) -> None:
        if self.redraw and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


class _Detached(Messenger):
    """Cuts what a draw has of the parameters that it was made with."""

    def _pyro_post_sample(self, msg: Message) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def compute(
    structure: Structure,
    batch: Batch | Tensor,
    *,
    num_particles: int = 1,
    vectorize: bool | None = None,
    per_dimension: bool = False,
    stop_guide: bool = False,
    detach: bool = False,
    share_globals: bool = False,
    states: GuideStates = "drawn",
    given: Mapping[str, Tensor] | None = None,
) -> Terms:
    """Runs guide and replayed model once, in the mode that they are in, and returns their terms.

    In training mode that is a training pass: dropout is on, and running statistics move. Use
    `evaluating` around it for the other mode.

    Arguments:
        structure: The pair, as `Pair.inspect` found it.
        batch: What its programs are called with, N data: a tuple, or one tensor.
        num_particles: K draws from the guide.
        vectorize: Whether particles go through the networks at once. None: yes, unless a
            comparison on this batch, made once, shows that it changes the numbers, or batch norm
            is training.
        per_dimension: Fill ``log_p_dims`` and ``log_q_dims`` of local latents.
        stop_guide: Fill ``stopped_log_q``: log q at the same draws, which keep their gradient,
            with the guide's parameters stopped.
        detach: Draws have no gradient, so that that of log q is the score function.
        share_globals: All particles have one draw of what is outside the data plate.
        states: What becomes of states that the guide marks to be enumerated: one is drawn;
            ``"averaged"``, all log densities are means over them; ``"summed"``, the log weight,
            and it alone, has them summed out.
        given: Values of guide sites, and of the data plate's indices, that aren't to be drawn.

    Raises:
        PairError: If the pair doesn't fit the batch.
        UndefinedError: If a site has no density per dimension.
    """
    check_int("num_particles", num_particles)
    batch = structure.place(batch)
    if num_particles > 1 and vectorize is None:
        vectorize = can_vectorize(structure, batch)
    if share_globals and structure.global_sites and num_particles > 1:
        given = _draw_globals(structure, batch, detach=detach) | dict(given or {})

    def one_pass(k: int) -> Terms:
        return _one_pass(structure, batch, k, given, per_dimension, stop_guide, detach, states)

    if num_particles == 1 or vectorize:
        return one_pass(num_particles)
    return stack(one_pass(1) for _ in range(num_particles))


def score_guide(
    structure: Structure,
    batch: Batch | Tensor,
    values: Mapping[str, Tensor],
    *,
    per_dimension: bool = False,
) -> dict[str, SiteTerms]:
    """log q of K given values under each of N data: every value under every datum.

    The guide alone runs, in the mode that it is in. The model is run only where it isn't known
    yet whether the pair's networks take several values at once. ``values`` are those of every
    latent, shape ``(K, *event_shape)``.

    Returns:
        The guide's sites by name, with ``log_q`` of shape ``(K, N)``.

    Raises:
        UndefinedError: If log q(z | x) isn't what the guide's latents score: with auxiliary sites,
            latents that are set to what another site gave, sites outside the data plate, or plates
            inside it.
    """
    batch = structure.place(batch)
    others = structure.auxiliary + structure.fed + structure.global_sites + structure.masked_apart
    if others or structure.nesting > 1 or isinstance(poutine.unwrap(structure.guide), Messenger):
        expected = "a guide whose latents, in the data plate alone, are all that it draws"
        actual = f"other sites: {oxford(others)}" if others else "inner plates, or an AutoMessenger"
        if structure.masked_apart:
            actual = f"{oxford(structure.masked_apart)}, masked in one program alone"
        fixes = ["pyro.sample(latent, q) for each latent, with .to_event(k) for axes of one datum"]
        raise UndefinedError("log q(z | x) of given z", expected, actual, fixes)
    count, rows = len(next(iter(values.values()))), structure.num_rows_of(batch)

    def score(part: slice) -> dict[str, SiteTerms]:
        given = {name: value[part].unsqueeze(1) for name, value in values.items()}
        num = len(next(iter(given.values())))
        if num == 1:  # no plate of particles, which would expand them
            given = {name: value[0].expand(rows, *value.shape[2:]) for name, value in given.items()}
        return _guide_pass(structure, batch, num, given, per_dimension=per_dimension)

    if count == 1 or can_vectorize(structure, batch):
        return score(slice(None))
    return _joined([score(slice(k, k + 1)) for k in range(count)])


def draw_guide(
    structure: Structure,
    batch: Batch | Tensor,
    *,
    num_particles: int = 1,
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, SiteTerms]:
    """The guide's sites alone, as `compute` has them: K draws without a pass of the model."""
    batch = structure.place(batch)
    if num_particles == 1 or can_vectorize(structure, batch):
        return _guide_pass(structure, batch, num_particles, given)
    return _joined([_guide_pass(structure, batch, 1, given) for _ in range(num_particles)])


def _guide_pass(
    structure: Structure,
    batch: Batch,
    num_particles: int,
    given: Mapping[str, Tensor] | None,
    *,
    per_dimension: bool = False,
) -> dict[str, SiteTerms]:
    program = in_particles(structure.guide, structure, num_particles, given)
    trace, _ = run_pair(structure.model, program, batch, model_too=False)
    collect = Collector(structure, num_particles, per_dimension=per_dimension)
    for site in sample_sites(trace):
        collect.guide(site, in_model=site["name"] not in structure.auxiliary)
    return collect.sites


def _joined(ones: list[dict[str, SiteTerms]]) -> dict[str, SiteTerms]:
    return {name: joined([one[name] for one in ones]) for name in ones[0]}


def can_vectorize(structure: Structure, batch: Batch) -> bool:
    """Whether particles may go through the networks at once; found out once, on this batch."""
    if any(isinstance(m, BatchNorm) and m.training for m in structure.modules):
        return False
    if "looped_because" not in structure.notes:
        reason = _compare(structure, batch)
        structure.notes["looped_because"] = reason
        if reason:
            warn(
                f"Particles are looped, not vectorised: {reason}. The numbers are right, the "
                "speed is that of one pass a particle. Networks that take any leading "
                "dimensions, (K, N, ...), can be vectorised."
            )
    return not structure.notes["looped_because"]


def _scored(structure: Structure, batch: Batch, values: Mapping[str, Tensor]) -> Terms:
    """A pass at given values; of the model alone, where the guide can't score them."""
    try:
        return _one_pass(structure, batch, 1, values)
    except UndefinedError:
        return _one_pass(replace(structure, guide=no_guide), batch, 1, values)


def no_guide(*batch: object) -> None:
    """A guide that leaves all latents to the model."""


def _compare(structure: Structure, batch: Batch) -> str:
    """Scores the same draws vectorised and one by one; returns why they differ, or nothing."""
    with probing((structure.model, structure.guide)):
        try:
            both = _one_pass(structure, batch, 2)
            given = [_draws_of(both, k, structure) for k in range(2)]
            ones = [_scored(structure, batch, values) for values in given]
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, OtherMasksError):
                raise
            return f"two particles at once fail with {first_line(error)}"
    for k, one in enumerate(ones):
        for name, site in both.sites.items():
            for key in ("log_p", "log_q"):
                ours, theirs = getattr(site, key), getattr(one.sites.get(name), key, None)
                if (
                    ours is not None
                    and theirs is not None
                    and (off := _difference(ours[k], theirs[0]))
                ):
                    return f"at site '{name}' {key} then differs by {off:.3g} nats"
    return ""


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of log densities; 0 where it is within rounding."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())  # infinities may be equal, too
    off = torch.where(same, 0.0, ours - theirs).abs().max()
    size = theirs.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1.0)
    return 0.0 if bool(off <= _TOLERANCE.get(ours.dtype, 1e-2) * size) else float(off)


def _draws_of(terms: Terms, k: int, structure: Structure) -> dict[str, Tensor]:
    """The draws of one particle, and the rows of the batch, to be scored again."""
    drawn = [s for s in terms.sites.values() if s.is_drawn]
    draws = {site.name: site.draws[k] for site in drawn if site.draws is not None}
    if structure.subsample_size is not None:
        draws[structure.plate] = terms.guide_trace.nodes[structure.plate]["value"]
    return draws


def _one_pass(
    structure: Structure,
    batch: Batch,
    num_particles: int,
    given: Mapping[str, Tensor] | None = None,
    per_dimension: bool = False,  # noqa: FBT001, FBT002
    stop_guide: bool = False,  # noqa: FBT001, FBT002
    detach: bool = False,  # noqa: FBT001, FBT002
    of_guide: GuideStates = "drawn",
) -> Terms:
    rank = structure.nesting + (num_particles > 1)
    is_listed = of_guide != "drawn" and bool(structure.guide_states)

    def wrapped(program: Program, first: int | None, *, is_listed: bool) -> Program:
        program = in_particles(program, structure, num_particles, None)
        program = poutine.enum(program, first_available_dim=first) if is_listed else program
        return _Given(given)(program) if given else program

    guide = wrapped(structure.guide, -rank - 1, is_listed=is_listed)
    # the model's states go on where the guide's have left off
    first, has_states = None if is_listed else -rank - 1, is_listed or bool(structure.enumerated)
    model = wrapped(structure.model, first, is_listed=has_states)
    before = randomness.get_state() if stop_guide and not is_capturing_graph() else None
    with _Detached() if detach else contextlib.nullcontext():
        guide_trace, model_trace = run_pair(model, guide, batch)
    unlike = look_at_masks(structure, batch, guide_trace, model_trace)
    align_masks(structure.masked_apart, guide_trace, model_trace)
    for name in structure.imputed:
        model_trace.nodes[name]["mask"] = False
    traces = guide_trace, model_trace
    states = States(structure, *traces, rank, of_guide) if has_states else None
    collect = Collector(structure, num_particles, per_dimension=per_dimension, states=states)
    for site in sample_sites(guide_trace):
        collect.guide(site, in_model=site["name"] in model_trace.nodes)
    for site in sample_sites(model_trace):
        if site["name"] not in structure.imputed:
            collect.model(site)
    collect.spoil(unlike)
    terms = collect.terms()
    terms.guide_trace, terms.model_trace = guide_trace, model_trace
    if stop_guide:
        _score_stopped(guide, batch, terms, before)
    return terms


def in_particles(
    program: Program, structure: Structure, num_particles: int, given: Mapping[str, Tensor] | None
) -> Program:
    """A program under the particle plate, with the given values set."""
    if num_particles > 1:
        program = pyro.plate(PARTICLES, num_particles, dim=-structure.nesting - 1)(program)
    return _Given(given)(program) if given else program


def _score_stopped(
    guide: Program, batch: Batch, terms: Terms, before: dict[str, Tensor] | None
) -> None:
    """A second guide pass at the same values, while no parameter requires a gradient.

    Stopping the parameters of the distributions instead would also cut what one latent
    contributes to the next one's distribution, and can't be done for a flow at all. The pass
    starts from the same generators, so that dropout drops the same units, and running statistics
    don't move twice; a graph, which can't go back to earlier generators, draws nothing again.
    Values go in under another name (a view), because a transform that has cached the draw would
    give back its cached, unstopped, log density.
    """
    if isinstance(poutine.unwrap(guide), Messenger):
        raise PairError("guide", "a guide that can be replayed", "an AutoMessenger", ["AutoNormal"])
    structure = terms.structure
    drawn = [s for s in terms.guide_trace.nodes.values() if s["type"] == "sample"]
    values = {s["name"]: s["value"].view_as(s["value"]) for s in drawn if not s["is_observed"]}
    collect = Collector(structure, terms.num_particles)
    with (
        _stopped(structure.parameters.values()),
        _statistics_kept(structure),
        contextlib.nullcontext() if before is None else randomness.forked(),
        _Given(values, redraw=before is not None),
    ):
        if before is not None:
            randomness.set_state(before)
        trace = poutine.trace(guide).get_trace(*batch)
        align_masks(structure.masked_apart, trace, terms.model_trace)
        for site in sample_sites(trace):  # a flow runs its networks only when it is scored
            collect.guide(site, in_model=site["name"] in terms.sites)
    stopped = collect.terms()
    terms.stopped_log_q, terms.stopped_global_log_q = stopped.log_q, stopped.global_log_q


def _draw_globals(structure: Structure, batch: Batch, *, detach: bool) -> dict[str, Tensor]:
    """One draw of the guide's sites outside the data plate, by a pass of the guide alone."""
    if isinstance(poutine.unwrap(structure.guide), Messenger):
        raise PairError("guide", "a guide that runs alone", "an AutoMessenger", ["AutoNormal"])
    with _statistics_kept(structure), _Detached() if detach else contextlib.nullcontext():
        trace, _ = run_pair(structure.model, structure.guide, batch, model_too=False)
    sites = [s for s in sample_sites(trace) if not is_inside(structure, s) and not is_factor(s)]
    return {site["name"]: site["value"] for site in sites}


@contextmanager
def _statistics_kept(structure: Structure) -> Iterator[None]:
    """Running statistics move by the one pass that counts, and not by another in here."""
    norms = [m for m in structure.modules if isinstance(m, Norm)]
    buffers = [b for m in norms if m.training for b in m.buffers(recurse=False)]
    copies = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for buffer, copy in zip(buffers, copies, strict=True):
            buffer.data.copy_(copy)  # autograd has saved them, and needn't know


@contextmanager
def _stopped(parameters: Iterable[Tensor]) -> Iterator[None]:
    trainable = [p for p in parameters if p.requires_grad]
    with warnings.catch_warnings():  # pyro.module warns of each parameter that has no gradient
        warnings.filterwarnings("ignore", message=".*was not registered in the param store")
        for p in trainable:
            p.requires_grad_(False)  # noqa: FBT003
        try:
            yield
        finally:
            for p in trainable:
                p.requires_grad_(True)  # noqa: FBT003
