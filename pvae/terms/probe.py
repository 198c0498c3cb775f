"""One traced batch of a pair, to find out what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pvae import randomness
from pvae.errors import PairError, PvaeError, oxford
from pvae.terms.messages import delta_of, extra_scale, is_factor, sample_sites
from pvae.terms.structure import Structure

__all__ = ["inspect_pair", "probing", "run_pair"]

Batch = tuple[Tensor, ...]


@contextmanager
def probing(roots: Iterable[Any]) -> Iterator[list[nn.Module]]:
    """Evaluation mode, forked generators, validation on; collects every module that runs.

    A function hides its networks in closures, so they are caught as they run.
    """
    found: dict[int, tuple[nn.Module, bool]] = {}
    modules: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        if id(module) not in found:
            found[id(module)] = (module, module.training)
            modules.append(module)
        module.training = False

    for root in roots:
        if isinstance(root, nn.Module):
            for module in root.modules():
                note(module)
    handle = register_module_forward_pre_hook(note)
    try:
        with randomness.forked(), torch.no_grad(), pyro.validation_enabled(is_validate=True):
            yield modules
    finally:
        handle.remove()
        for module, training in found.values():
            module.training = training


def inspect_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    plate: str | None = None,
) -> Structure:
    """Traces one batch of a pair, in evaluation mode and on forked generators.

    Arguments:
        model: A Pyro program; a module, a function or a method.
        guide: Its guide.
        batch: What they are called with; the first tensor's first axis counts the data.
        plate: Name of the data plate. If None: the only plate that has the batch's length.

    Raises:
        PairError: If there is no data plate or more than one candidate, a latent of the model
            has no guide, or a site can't be scored.
    """
    with probing((model, guide)) as modules:
        guide_trace, model_trace = run_pair(model, guide, batch)
        again, _ = run_pair(model, guide, batch, model_too=False)
    sites = [*sample_sites(guide_trace), *sample_sites(model_trace)]
    frame = _data_frame(sites, batch, plate)
    local = {s["name"] for s in sites if frame.name in (f.name for f in s["cond_indep_stack"])}
    guided = {s["name"]: s for s in sample_sites(guide_trace) if not s["is_observed"]}
    in_model = {s["name"]: s for s in sample_sites(model_trace)}
    latents = [n for n, s in in_model.items() if not s["is_observed"]]
    unguided = [n for n in latents if n not in guided]
    _check_sites(guided, in_model, unguided, frame)
    rows = len(batch[0])
    parameters, unannounced = _parameters(model, guide, guide_trace, model_trace, modules)
    return Structure(
        plate=frame.name,
        dim=frame.dim,
        nesting=max(-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized),
        subsample_size=None if _size(frame, sites) == rows else frame.size,
        full_size=_full_size(frame, sites),
        is_scaled=_full_size(frame, sites) != _size(frame, sites),
        latents=tuple(n for n in latents if n in local and n in guided),
        global_latents=tuple(n for n in latents if n not in local and n in guided),
        observed=tuple(n for n, s in in_model.items() if s["is_observed"] and not is_factor(s)),
        auxiliary=tuple(n for n in guided if n not in in_model),
        points=frozenset(n for n, s in guided.items() if _is_point(s, again.nodes[n])),
        enumerated=tuple(unguided),
        removed_scales=_removed_scales(sites),
        parameters=parameters,
        modules=tuple(modules),
        unannounced=unannounced,
    )


def run_pair(
    model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, *, model_too: bool = True
) -> tuple[Any, Any]:
    """Traces of the guide and of the model replayed against it; errors say which one failed."""
    unwrapped = poutine.unwrap(guide)
    if isinstance(unwrapped, poutine.messenger.Messenger):  # an AutoMessenger runs both itself
        _named("guide", lambda: guide(*batch), batch)
        model_trace, guide_trace = unwrapped.get_traces()
        return guide_trace, model_trace
    guide_trace = _named("guide", lambda: poutine.trace(guide).get_trace(*batch), batch)
    if not model_too:
        return guide_trace, None
    replayed = poutine.replay(model, trace=guide_trace)
    return guide_trace, _named("model", lambda: poutine.trace(replayed).get_trace(*batch), batch)


def _named(what: str, run: Callable[[], Any], batch: Batch) -> Any:
    try:
        return run()
    except Exception as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        for cause in reversed(chain):  # the first error; the others are Pyro's additions to it
            if isinstance(cause, PvaeError):
                raise cause from None
        shapes = ", ".join(str(tuple(b.shape)) if isinstance(b, Tensor) else repr(b) for b in batch)
        first_line = (str(error).strip() or "no message").splitlines()[0]
        raise PairError(
            what,
            f"to run when called with a batch of shape {shapes}",
            f"{type(error).__name__}: {first_line}",
            [
                f"{what}(*batch) on one batch by hand, to see the whole traceback",
                "every site .to_event(k), so that batch_shape is the plates' sizes",
            ],
        ) from error


def _size(frame: Any, sites: list[Any]) -> int:
    """A plate's size; a plate written without one has the size of what stands in it."""
    if frame.size != -1:
        return int(frame.size)
    sizes = [1]
    for site in sites:
        if any(f.name == frame.name for f in site["cond_indep_stack"]):
            shape = site["fn"].batch_shape
            sizes.append(shape[frame.dim] if len(shape) >= -frame.dim else 1)
    return max(sizes)


def _full_size(frame: Any, sites: list[Any]) -> int:
    full = frame.full_size
    return _size(frame, sites) if full in (None, -1) else int(full)


def _data_frame(sites: list[Any], batch: Batch, plate: str | None) -> Any:
    rows = len(batch[0])
    frames = {f.name: f for s in sites for f in s["cond_indep_stack"] if f.vectorized}
    sequential = {f.name for s in sites for f in s["cond_indep_stack"] if not f.vectorized}
    known = ", ".join(f"'{n}' of size {_size(f, sites)}" for n, f in frames.items()) or "none"
    if plate is not None:
        if plate not in frames:
            raise PairError(
                "plate",
                "the name of a vectorised plate of the pair",
                f"{plate!r}; the plates are: {known}",
            )
        return frames[plate]
    found = [f for f in frames.values() if _size(f, sites) == rows]
    found = found or [f for f in frames.values() if _full_size(f, sites) == rows]
    if len(found) == 1:
        return found[0]
    if found:
        raise PairError(
            "data plate",
            f"one plate with the batch's length {rows}",
            f"{oxford(f.name for f in found)}",
            [f"plate='{found[0].name}'", "a batch of another length"],
        )
    vectorised = "with pyro.plate('data', len(x)): z = pyro.sample('z', ...)"
    fixes = [f"the plates' sizes: {known}"] if frames else []
    if sequential:
        fixes = [f"{vectorised}, instead of 'for i in pyro.plate(...)'"]
    raise PairError(
        "data plate",
        f"a vectorised plate of the batch's length {rows}",
        f"only the sequential plate(s) {oxford(sequential)}"
        if sequential
        else f"plates: {known}"
        if frames
        else "no plate at all",
        fixes or [vectorised + ", in model and guide"],
    )


def _check_sites(
    guided: dict[str, Any], in_model: dict[str, Any], unguided: list[str], frame: Any
) -> None:
    for name in unguided:
        site = in_model[name]
        if (site["infer"] or {}).get("enumerate") != "parallel":
            raise PairError(
                f"site '{name}'",
                "a site of that name in the guide",
                f"the guide's sites: {oxford(guided) if guided else 'none'}",
                [
                    f"pyro.sample('{name}', ...) in the guide",
                    "infer={'enumerate': 'parallel'} in the model, to sum a discrete latent out",
                    "obs=..., if it is data",
                ],
            )
        plates = [f.name for f in site["cond_indep_stack"]]
        if plates != [frame.name]:
            raise PairError(
                f"enumerated site '{name}'",
                f"the data plate '{frame.name}' and no other around it",
                f"plates: {oxford(plates) if plates else 'none'}",
                ["a guide for it"],
            )
    for name, site in guided.items():
        auxiliary = (site["infer"] or {}).get("is_auxiliary")
        if name not in in_model and not auxiliary:
            raise PairError(
                f"guide site '{name}'",
                "a latent site of that name in the model",
                f"the model's sites: {oxford(in_model) if in_model else 'none'}",
                ["the same name in model and guide", "infer={'is_auxiliary': True}"],
            )
        if name in in_model and in_model[name]["is_observed"]:
            raise PairError(
                f"site '{name}'",
                "a latent in the model, as it is in the guide",
                "observed data",
                ["drop it from the guide", "call the model without that data"],
            )


def _is_point(site: Any, again: Any) -> bool:
    """A Delta is a point if its density is 1 and nothing random feeds it."""
    delta = delta_of(site["fn"])
    if delta is None or bool((delta[0].log_density != 0).any()):
        return False
    return torch.equal(site["value"], again["value"])


def _removed_scales(sites: list[Any]) -> dict[str, float]:
    removed = {}
    for site in sites:
        scale = extra_scale(site)
        if isinstance(scale, Tensor):
            removed[site["name"]] = float(scale.double().mean())
        elif abs(scale - 1.0) > 1e-9:
            removed[site["name"]] = float(scale)
    return removed


def _parameters(
    model: Any, guide: Any, guide_trace: Any, model_trace: Any, modules: list[nn.Module]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Parameters of modules by attribute name, of the store by store name; each tensor once."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()

    def add(name: str, tensor: Tensor) -> None:
        if tensor.requires_grad and id(tensor) not in seen:
            seen.add(id(tensor))
            named[name] = tensor

    for prefix, root in (("model", model), ("guide", guide)):
        if isinstance(root, nn.Module):
            for name, parameter in root.named_parameters():
                add(f"{prefix}.{name}", parameter)
    for trace in (guide_trace, model_trace):
        for site in trace.nodes.values():
            if site["type"] == "param":
                add(site["name"], site["value"].unconstrained())
    missing = [
        f"{type(m).__name__}.{name}"
        for m in modules
        for name, parameter in m.named_parameters(recurse=False)
        if parameter.requires_grad and id(parameter) not in seen
    ]
    return named, tuple(missing)
