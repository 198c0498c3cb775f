"""Conformance tests for parts and pairs, yours as well as pvae's own.

`check_conditional` tests a prior, a likelihood or a guide family; `check_pair` a model and its
guide. Both raise a `ContractError` that names the rule that is broken, and return nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pvae import randomness
from pvae.annotations import strict
from pvae.conditional import Conditional
from pvae.data import first_batch
from pvae.devices import double
from pvae.errors import ContractError, PvaeError, UndefinedError, warn
from pvae.modes import evaluating
from pvae.objectives import ELBO
from pvae.options import tool
from pvae.pair import Batch, PairLike, Structure, as_pair
from pvae.terms import compute, prepared
from pvae.types import Dist

__all__ = ["check_conditional", "check_pair"]


def _require(rule: str, holds: object, actual: str, *fixes: str) -> None:
    if not bool(holds):
        raise ContractError(rule.split(":")[0], rule.split(":", 1)[1].strip(), actual, fixes)


@strict
def check_conditional(
    conditional: Conditional, *context: Tensor, value: Tensor | None = None, tolerance: float = 1e-4
) -> None:
    """Tests the contract of a `Conditional`.

    The rules: it returns a Pyro distribution with its event shape complete and one batch
    dimension for each of the context's; what it draws, it can score, with a finite number each;
    it can be expanded, as plates do; a further leading dimension of the context (particles) gives
    what a loop gives; everything in it follows ``.double()``; every parameter gets a gradient;
    Pyro's parameter store stays as it was.

    Arguments:
        conditional: What to test; a copy is used.
        context: A batch of context, N of each; none for a prior.
        value: A value to score, shape ``(N, *event_shape)``, where none can be drawn.
        tolerance: Largest difference of log densities, relative to their size.

    Raises:
        ContractError: If a rule is broken.

    Example:
        >>> from pvae import priors
        >>> check_conditional(priors.Laplace(3))
    """
    before = dict(pyro.get_param_store().named_parameters())
    conditional = copy.deepcopy(conditional).eval()
    with randomness.forked(seed=0):
        fn = conditional(*context)
        rule, fix = "parameters: none in Pyro's global store", "nn.Parameter instead of pyro.param"
        now = dict(pyro.get_param_store().named_parameters())
        _require(rule, now == before, "the store has changed", fix)
        is_one = isinstance(fn, dist.Distribution)
        _require("forward: a Pyro distribution", is_one, type(fn).__name__)
        _check_shapes(conditional, fn, context)
        drawn = _draw(fn, value)
        log_prob = fn.log_prob(drawn)
        actual = f"shape {tuple(log_prob.shape)} for batch_shape {tuple(fn.batch_shape)}"
        rule = "log_prob: one number for each value of the batch"
        _require(rule, log_prob.shape == fn.batch_shape, actual, ".to_event(k)")
        _require("log_prob: finite at its own draws", log_prob.isfinite().all(), f"{log_prob}")
        expanded = fn.expand(torch.Size([2, *fn.batch_shape])).log_prob(drawn)
        is_same = expanded.shape == (2, *fn.batch_shape)
        is_same = is_same and _close(expanded[1], log_prob, tolerance)
        rule = "expand: the same log density for each copy"
        _require(rule, is_same, f"{expanded} against {log_prob}")
        if context:
            _check_particles(conditional, context, drawn, tolerance)
        _check_gradients(conditional, context, drawn)
        _check_double(conditional, context)


def _check_shapes(conditional: Conditional, fn: Dist, context: tuple[Tensor, ...]) -> None:
    event_shape, batch_shape = tuple(fn.event_shape), tuple(fn.batch_shape)
    if (shape := conditional.event_shape) is not None:
        _require(f"event_shape: {shape}", event_shape == shape, f"{event_shape}", ".to_event(k)")
    allowed = [(), *(tuple(part.shape[:1]) for part in context[:1])]
    rule = f"batch_shape: {' or '.join(map(str, allowed))}"
    _require(rule, batch_shape in allowed, f"{batch_shape}", ".to_event(k)")


def _draw(fn: Dist, value: Tensor | None) -> Tensor:
    if value is not None:
        return value
    try:
        return fn()
    except UndefinedError:  # an improper density: any value will do
        return torch.zeros(fn.batch_shape + fn.event_shape, dtype=torch.float64)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0))


def _check_particles(
    conditional: Conditional, context: tuple[Tensor, ...], drawn: Tensor, tolerance: float
) -> None:
    rolled = [[part.roll(k, dims=0) for part in context] for k in range(3)]
    has_rows = len(drawn) == len(context[0])
    values = [drawn.roll(k, dims=0) if has_rows else drawn for k in range(3)]
    fix = "flatten leading dimensions before the network, and restore them"
    try:
        at_once = conditional(*map(torch.stack, zip(*rolled, strict=True)))
    except (RuntimeError, ValueError) as error:
        expected = "context (K, N, ...) to be taken like (N, ...)"
        actual = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ContractError("leading dimensions", expected, actual, [fix]) from error
    each = [conditional(*c).log_prob(v) for c, v in zip(rolled, values, strict=True)]
    both, looped = at_once.log_prob(torch.stack(values)), torch.stack(each)
    rule = "leading dimensions: context (K, N, ...) gives what a loop over K gives"
    actual = f"shape {tuple(both.shape)} for {tuple(looped.shape)}"
    _require(rule, both.shape == looped.shape, actual, fix)
    actual = f"a difference of {float((both - looped).abs().max().detach()):.3g}"
    _require(rule, _close(both, looped, tolerance), actual, fix)


def _check_gradients(conditional: Conditional, context: tuple[Tensor, ...], drawn: Tensor) -> None:
    fn = conditional(*context)
    loss = fn.log_prob(drawn).sum()
    if fn.has_rsample:
        with contextlib.suppress(UndefinedError):
            loss = loss + fn().sum()
    _require_gradients(loss, {n: p for n, p in conditional.named_parameters() if p.requires_grad})


def _require_gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> None:
    gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if loss.requires_grad and parameters:
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    by_name = dict(zip(parameters, gradients, strict=True))
    idle = [name for name, g in by_name.items() if g is None]
    _require("parameters: a gradient for each", not idle, f"none for {', '.join(idle)}")
    bad = [name for name, g in by_name.items() if g is not None and not g.isfinite().all()]
    _require("gradient: finite", not bad, f"not finite for {', '.join(bad)}")


def _check_double(conditional: Conditional, context: tuple[Tensor, ...]) -> None:
    tensors = (*conditional.parameters(), *conditional.buffers())
    where = next((double(t).device for t in (*tensors, *context)), torch.device("cpu"))
    wide = copy.deepcopy(conditional).to(where).double()
    parts = [double(c) if c.is_floating_point() else c.to(where) for c in context]
    fn = wide(*parts)
    dtype = fn.log_prob(_draw(fn, None)).dtype
    rule = "dtype: everything follows .double()"
    fix = "register_buffer for constants; build the distribution in forward"
    _require(rule, dtype == torch.float64, f"log_prob of type {dtype}", fix)


@tool
def check_pair(pair: PairLike, batch: object, *, tolerance: float = 1e-4) -> None:
    """Tests the contract of a pair.

    The rules: its sites match and its data plate can be found; the ELBO over its terms is that of
    Pyro's ``Trace_ELBO``; several particles at once give what a loop gives (or are looped, with a
    warning); a datum's terms don't depend on what else is in the batch; every parameter gets a
    finite gradient. Modules that put parameters into Pyro's global store are warned about.

    Arguments:
        pair: A model and its guide.
        batch: What they are called with, at least two data: an array or a tuple of arrays.
        tolerance: Largest difference of log densities, relative to their size.

    Raises:
        ContractError: If a rule is broken.
        PairError: If the pair can't be traced.
    """
    store = pyro.get_param_store()
    before = dict(store.named_parameters())
    pair = as_pair(pair, "check_pair")
    with prepared(pair, batch, {}) as evaluation:
        batch = first_batch(evaluation.source, evaluation.num_rows)
    structure = pair.inspect(batch)
    with evaluating(structure.modules), randomness.forked(seed=0):
        if not (
            structure.enumerated or structure.masked_apart or structure.imputed
        ):  # Pyro's is wrong
            _check_elbo(batch, structure, tolerance)
        compute(structure, batch, num_particles=2)
        if structure.takes_any_rows:
            _check_independence(batch, structure, tolerance)
    with evaluating(structure.modules), torch.enable_grad(), randomness.forked(seed=0):
        _require_gradients(_loss(structure, batch), structure.parameters)
    are_modules = all(isinstance(p, torch.nn.Module) for p in (pair.model, pair.guide))
    if are_modules and dict(store.named_parameters()) != before:
        warn(
            "The pair's modules have parameters in Pyro's global store, where two pairs of the "
            "same names meet. Plain nn.Module, or pyro.settings module_local_params=True, keep "
            "them apart."
        )


def _loss(structure: Structure, batch: Batch) -> Tensor:
    """The negative ELBO, as training has it."""
    objective = ELBO()
    return objective.surrogate(compute(structure, batch), objective.make_state(structure))


def _check_elbo(batch: Batch, structure: Structure, tolerance: float) -> None:
    with randomness.forked(seed=1):
        theirs = Trace_ELBO().loss(structure.model, structure.guide, *batch)
    with randomness.forked(seed=1):
        ours = float(_loss(structure, batch))
    is_same = abs(ours - theirs) <= tolerance * max(1.0, abs(theirs))
    _require("ELBO: that of Pyro's Trace_ELBO", is_same, f"{ours:.6g} against {theirs:.6g}")


def _check_independence(batch: Batch, structure: Structure, tolerance: float) -> None:
    whole = compute(structure, batch)
    half = structure.num_rows_of(batch) // 2
    given = {}
    for name, site in whole.sites.items():
        if site.is_drawn and site.draws is not None:
            value = site.draws[0]
            axis = site.data_axis if site.is_local else None
            given[name] = value if axis is None else value.narrow(axis - 1, 0, half)
    pairs = zip(batch, structure.axes, strict=True)
    first = tuple(b if axis is None else b.narrow(axis, 0, half) for b, axis in pairs)
    try:
        part = compute(structure, first, given=given)
    except PvaeError:  # a plate of fixed size
        return
    both = (whole.log_weight[:, :half], part.log_weight)
    rule = "data: a datum's terms don't depend on the rest of the batch"
    actual = f"a difference of {float((both[0] - both[1]).abs().max()):.3g}"
    fix = "no softmax or norm over the batch dimension"
    _require(rule, _close(*both, tolerance), actual, fix)
