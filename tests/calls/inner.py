"""Calls of what tools are made of: parts, data, pairs, terms, steps, checkpoints, randomness."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae import (
    checkpoint,
    conditional,
    data,
    engine,
    jacobian,
    networks,
    objectives,
    pair,
    randomness,
    sites,
    terms,
)
from tests.calls.table import D, Q, call, normal, rows, vae


@call(
    *("conditional.Conditional", "conditional.FromNetwork", "conditional.Unconditional"),
    *("conditional.as_conditional", "conditional.positive_scale", "conditional.split_parameters"),
)
def conditionals(device: torch.device) -> Any:
    prior = conditional.as_conditional(dist.Normal(torch.zeros(Q), 1.0).to_event(1)).to(device)
    z = normal(device, 5, Q)
    split = conditional.split_parameters(normal(device, 5, 6), 2, (3,))
    return prior().log_prob(z), conditional.positive_scale(z), split


@call(
    *("networks.MLP", "networks.ConvEncoder", "networks.ConvDecoder", "networks.unit_norm"),
)
def all_networks(device: torch.device) -> Any:
    torch.manual_seed(0)
    images, z = normal(device, 3, 1, 8, 8), normal(device, 3, Q)
    encoder = networks.ConvEncoder((1, 8, 8), Q, channels=(2, 4), hidden=8)
    decoder = networks.ConvDecoder(Q, (1, 8, 8), channels=(4, 2), hidden=8)
    parts: list[tuple[nn.Module, Tensor]] = [
        (networks.MLP(Q, D, (4,)), z),
        (encoder, images),
        (decoder, z),
    ]
    parts.append((networks.unit_norm(nn.Linear(Q, D)), z))
    return [network.to(device)(x) for network, x in parts]


@call("jacobian.squared_jacobian_norm", "jacobian.squared_norm_of", "jacobian.differentiable_twice")
def jacobians(device: torch.device) -> Any:
    x = normal(device, 4, D).requires_grad_()
    with jacobian.differentiable_twice():
        norm = jacobian.squared_jacobian_norm(torch.tanh, x, create_graph=True)
    norm.sum().backward()
    slope = x.grad
    x = normal(device, 4, D).requires_grad_()
    return norm.detach(), slope, jacobian.squared_norm_of(x.sin(), x)


@call(
    *("data.as_source", "data.Source", "data.check_rows", "data.first_batch", "data.in_memory"),
    *("data.joined", "data.num_rows_of", "data.Batches", "data.Mixed", "data.LoaderSource"),
    *("data.RowCheck", "data.Support"),
)
def sources(device: torch.device) -> Any:
    x, found = rows(torch.device("cpu")), []
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 5)
    support = data.Support(lambda t: (t >= 0) & (t <= 1), "numbers from 0 to 1")
    for given in (x, x.numpy(), loader, rows(device), data.Data((x.numpy(),), binarize="static")):
        source = data.as_source(given, device)
        data.check_rows(source, {0: support})
        found.append(data.first_batch(data.in_memory(source), 7))
        found += [data.joined(data.Batches(source, 5).epoch(0)) for _ in range(2)]
    mixed = data.Mixed({"a": data.Batches(source, 12), "b": data.Batches(source, 8)})
    assert all(t.device.type == device.type for batch in found for t in batch)
    assert {data.num_rows_of(batch) for batch in found} == {7, len(x)}
    return found, list(mixed.epoch(0))


@call("data.LinearGaussian", "data.principal_components")
def toys(device: torch.device) -> Any:
    x = normal(device, 30, D)
    toy = data.principal_components(x, Q)
    assert toy.sample(5, seed=1).device.type == device.type
    # Principal axes have no sign, so that their product is compared.
    return toy.weight @ toy.weight.T, toy.log_evidence(x), toy.posterior(x)[1], toy.sigma


def traced(device: torch.device) -> tuple[Any, Any, Any]:
    made, batch = vae(device), (rows(device),)
    structure = pair.Pair(made.model, made.guide).inspect(batch)
    pyro.set_rng_seed(1)
    return structure, batch, pair.run_pair(made.model, made.guide, batch)[1]


@call(
    *("pair.Structure", "terms.Structure", "pair.run_pair", "pair.probing", "pair.put_back"),
    *("pair.observed_sites", "pair.Observed", "pair.is_inside", "pair.is_penalty"),
    *("pair.mask_of", "pair.rows_from", "pair.rows_to", "pair.Uses", "pair.Account"),
    draws=True,
)
def programs(device: torch.device) -> Any:
    structure, batch, trace = traced(device)
    site = trace.nodes["x"]
    assert pair.is_inside(structure, site)
    assert not pair.is_penalty(site)
    assert pair.mask_of(site) is None
    with pair.probing((structure.model, structure.guide)), pair.Uses(batch) as uses:
        structure.guide(*batch)
    with pair.put_back((structure.model, structure.guide)):
        structure.guide(*batch)
    seen = pair.observed_sites(structure, trace, batch)["x"].data
    moved = pair.rows_to(1, 0, seen)
    account = pair.Account.of({"model": structure.model, "guide": structure.guide})
    return (
        sorted(uses.used),
        sorted(account.entries),
        moved,
        pair.rows_from(1, 0, moved),
        trace.nodes["z"]["value"],
    )


@call("sites.announce_parameters", "sites.without_announcements", draws=True)
def announcements(device: torch.device) -> Any:
    layer = nn.Linear(Q, D).to(device)
    with pyro.poutine.trace(param_only=True) as trace:
        sites.announce_parameters(layer, "layer")
        with sites.without_announcements():
            sites.announce_parameters(layer, "other")
    return {
        name: site["value"].device.type == device.type for name, site in trace.trace.nodes.items()
    }


@call(
    *("terms.compute", "terms.Terms", "terms.SiteTerms", "terms.draw_guide", "terms.score_guide"),
    "terms.mean_of",
    draws=True,
)
def all_terms(device: torch.device) -> Any:
    structure, batch, _ = traced(device)
    found = terms.compute(structure, batch, num_particles=3, per_dimension=True)
    drawn = terms.draw_guide(structure, batch, num_particles=2)
    values = {name: site.value for name, site in drawn.items() if site.value is not None}
    of_one_datum = {name: value[:, 0] for name, value in values.items()}
    scored = terms.score_guide(structure, batch, of_one_datum)
    mean = terms.mean_of(dist.Normal(batch[0], 1.0))
    return found.log_weight, values, [site.log_q for site in scored.values()], mean


@call(
    *("terms.prepared", "terms.Evaluation", "terms.stream", "terms.draw_globals"),
    *("terms.first_rows", "terms.fits_particles", "terms.look_at", "terms.check_data"),
    *("terms.check_own_rows", "terms.has_own_rows", "terms.check_place"),
    draws=True,
)
def streams(device: torch.device) -> Any:
    made, x = vae(device), rows(device)
    options = {"device": device, "progress": False, "max_rows": 16}
    with terms.prepared(made, x, options) as evaluation:
        chunks = [part.log_weight for _, part in terms.stream(evaluation, 2)]
        drawn = terms.draw_globals(evaluation, 2)
        first = terms.first_rows(evaluation)
        assert terms.fits_particles(evaluation)
    structure, source = terms.look_at(pair.Pair(made.model, made.guide), x, device, torch.float32)
    terms.check_data(structure, source)
    terms.check_place(structure, device)
    terms.check_own_rows(structure, source)
    return chunks, first, drawn is not None, terms.has_own_rows(structure, (x,))


def stepper(device: torch.device) -> tuple[engine.Stepper, tuple[Tensor, ...]]:
    structure, batch, _ = traced(device)
    objective = objectives.ELBO()
    parameters = list(structure.parameters.values())
    optimizer = engine.make_optimizer(torch.optim.Adam, parameters, 1e-2)
    state = objective.make_state(structure, 100)
    return engine.Stepper(structure, objective, optimizer, state), batch


@call(
    *("engine.Stepper", "engine.MixedStepper", "engine.make_optimizer", "engine.choose"),
    *("engine.Backup", "engine.Failure"),
    draws=True,
)
def steps(device: torch.device) -> Any:
    one, batch = stepper(device)
    with pyro.validation_enabled(is_validate=False):
        for step in range(3):
            one(batch, step)
        found = [one.averages(), [p.detach().clone() for p in one.parameters]]
        backup = engine.Backup(one.parameters)
        mixed = engine.MixedStepper({"a": one})
        mixed(("a", batch), 3)
        backup.restore()
    engine.choose(one, lambda: batch, 1)
    return found, [p.detach() for p in one.parameters]


@call("engine.OptimizerOfPyro")
def optimisers_of_pyro(device: torch.device) -> Any:
    p = normal(device, 3).requires_grad_()
    made = engine.OptimizerOfPyro(pyro.optim.ClippedAdam({"lr": 0.1}), {"p": p})
    p.square().sum().backward()
    made.optimizer.step()
    return p


@call("engine.Repeated", draws=True)
def repeated(device: torch.device) -> Any:
    torch.manual_seed(0)

    def double(k: int, x: Tensor) -> Tensor:
        return k * x + torch.randn(3, device=x.device)

    made = engine.Repeated(double, calls=10, dtype=torch.float32, engine="eager")
    return [made(2, normal(device, 3)) for _ in range(3)]


@call("engine.compile_function")
def compiled(device: torch.device) -> Any:
    """Compiled on a CPU and on a GPU; there is no compiler for a pretend one."""
    from tests import pretend

    function, x = torch.tanh, normal(device, 4)
    if pretend.kind() is None:
        return engine.compile_function(lambda t: (function(t),), (x,))(x)
    return (function(x),)


@call(
    *("checkpoint.save", "checkpoint.load", "checkpoint.Checkpoint", "checkpoint.environment"),
    *("checkpoint.optimizer_state", "checkpoint.restore_optimizer"),
    draws=True,
)
def checkpoints(device: torch.device) -> Any:
    one, batch = stepper(device)
    one(batch, 0)
    tensors, rest = checkpoint.optimizer_state(one.optimizer)
    assert checkpoint.environment(device)["device"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.safetensors"
        checkpoint.save(path, checkpoint.Checkpoint(tensors, {"rest": rest}))
        read = checkpoint.load(path)
    other, _ = stepper(device)
    checkpoint.restore_optimizer(other.optimizer, read.tensors, read.meta["rest"])
    return tensors, checkpoint.optimizer_state(other.optimizer)[0]


@call(
    *("randomness.forked", "randomness.get_state", "randomness.set_state"),
    *("randomness.set_seed", "randomness.derive_seed"),
    *("randomness.get_own", "randomness.set_own"),
    draws=True,
)
def generators(device: torch.device) -> Any:
    def draw() -> Tensor:
        return torch.randn(4, device=device)

    randomness.set_seed(randomness.derive_seed(1, 2))
    state, first = randomness.get_state(), draw()
    with randomness.forked(seed=3):
        inside = draw()
    second = draw()
    randomness.set_state(state)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    own = torch.Generator(device).manual_seed(4)
    states = randomness.get_own([own])
    third = torch.randn(4, device=device, generator=own)
    randomness.set_own([own], states)
    assert torch.equal(torch.randn(4, device=device, generator=own), third)
    return first, inside, second, third
