"""Private attributes of torch and Pyro: each is there, and does what pvae relies on."""

from __future__ import annotations

import ast
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import pvae
from pvae import internals
from pvae.engine.compiler import OPTIONS, compile_graph

ROOT = Path(pvae.__file__).parent
HOMES = {ROOT / "internals.py", ROOT / "engine" / "compiler.py"}
LAYERS = {
    "BatchNorm": (
        internals.BatchNorm,
        [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm1d],
        [nn.InstanceNorm1d, nn.LayerNorm, nn.GroupNorm],
    ),
    "Norm": (
        internals.Norm,
        [nn.BatchNorm1d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm3d],
        [nn.LayerNorm, nn.GroupNorm],
    ),
    "Convolution": (
        internals.Convolution,
        [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d],
        [nn.Linear, nn.Bilinear],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_base_classes_of_layers(name: str) -> None:
    base, inside, outside = LAYERS[name]
    assert all(issubclass(kind, base) for kind in inside)
    assert not any(issubclass(kind, base) for kind in outside)


def deterministic() -> None:
    """Pyro marks deterministic sites, and no others."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)

    nodes = poutine.trace(model).get_trace().nodes
    assert nodes["twice"]["infer"][internals.DETERMINISTIC]
    assert not nodes["z"]["infer"].get(internals.DETERMINISTIC)


def enumerate_dim() -> None:
    """Pyro says along which dimension it has enumerated a site."""

    @poutine.enum(first_available_dim=-2)
    def model() -> None:
        pyro.sample("z", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})

    trace = poutine.trace(model).get_trace()
    infer = trace.nodes["z"]["infer"]
    assert infer[internals.ENUMERATE_DIM] == -2
    assert trace.nodes["z"]["value"].shape == (3, 1)
    trace.symbolize_dims()
    assert infer[internals.DIM_TO_SYMBOL] == {-2: infer[internals.ENUMERATE_SYMBOL]}


def mask() -> None:
    given = torch.tensor([True, False])
    fn = dist.Normal(torch.zeros(2), 1.0).mask(given)
    assert isinstance(fn, MaskedDistribution)
    found = internals.mask_of(fn)
    assert isinstance(found, Tensor)
    assert torch.equal(found, given)


def version() -> None:
    x = torch.ones(2)
    before = internals.version(x)
    x.mul_(1.0)
    assert internals.version(x) > before


def hooks() -> None:
    for register in ("register_step_pre_hook", "register_step_post_hook"):
        optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
        assert not internals.has_step_hooks(optimizer)
        handle = getattr(optimizer, register)(lambda *_: None)
        assert internals.has_step_hooks(optimizer)
        handle.remove()
        assert not internals.has_step_hooks(optimizer)


def skipping() -> None:
    """What says that it can skip a step does so, on the CPU as on CUDA."""
    parameter = torch.ones(2, requires_grad=True)
    assert not internals.can_skip_on_device(torch.optim.SGD([parameter], lr=0.1, fused=False))
    optimizer = torch.optim.Adam([parameter], lr=0.1, fused=True)
    assert internals.can_skip_on_device(optimizer)
    parameter.grad = torch.ones(2)
    for found_inf in (0.0, 1.0):
        before = parameter.detach().clone()
        setattr(optimizer, "found_inf", torch.tensor(found_inf, dtype=torch.float32))  # noqa: B010
        optimizer.step()
        assert torch.equal(parameter, before) is bool(found_inf)


def adam() -> None:
    """The second step of Adam by hand: Kingma and Ba's algorithm 1; weight decay as in AdamW."""
    lr, eps, decay, (beta1, beta2), g = 0.1, 1e-8, 0.5, (0.8, 0.9), 2.0
    for is_decoupled in (False, True):
        parameter = torch.ones(1, requires_grad=True)
        parameter.grad = torch.full((1,), g)
        m, v, step = torch.full((1,), 0.3), torch.full((1,), 0.7), torch.ones(())
        with torch.no_grad():
            internals.fused_adam(
                [parameter],
                [{"exp_avg": m, "exp_avg_sq": v, "step": step}],
                {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay},
                is_decoupled=is_decoupled,
            )
        gradient = g if is_decoupled else g + decay * 1.0
        first, second = (
            beta1 * 0.3 + (1 - beta1) * gradient,
            beta2 * 0.7 + (1 - beta2) * gradient**2,
        )
        change = (first / (1 - beta1**2)) / (math.sqrt(second / (1 - beta2**2)) + eps)
        start = 1.0 - lr * decay if is_decoupled else 1.0
        assert parameter.item() == pytest.approx(start - lr * change)
        assert (m.item(), v.item(), step.item()) == pytest.approx((first, second, 2.0))


def many() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([[2.0]])]
    assert internals.norms(tensors).tolist() == [5.0, 2.0]
    assert [x.tolist() for x in internals.multiply(tensors, torch.tensor(2.0))] == [[6, 8], [[4]]]


def messengers() -> None:
    """The methods of a messenger of one's own, by the names of Pyro's own messengers."""
    called: list[str] = []

    class Noting(Messenger):
        def _pyro_sample(self, msg: dict[str, object]) -> None:
            called.append(f"before {msg['name']}")

        def _pyro_post_sample(self, msg: dict[str, object]) -> None:
            called.append(f"after {msg['name']}")

    with Noting():
        pyro.sample("z", dist.Normal(0.0, 1.0))
    assert called == ["before z", "after z"]


def networks() -> None:
    """What a module consists of; a replaced part, and one that is frozen, show."""
    net = nn.BatchNorm1d(2)
    whole = nn.Sequential(net, nn.ReLU())
    parts = internals.network_parts(whole)
    assert whole[0] in list(parts[2].values())  # type: ignore[attr-defined]
    assert net.running_mean in list(internals.network_parts(net)[1].values())  # type: ignore[attr-defined]
    before = internals.network_state([whole, net])
    net.weight.requires_grad_(False)  # noqa: FBT003
    assert internals.network_state([whole, net]) != before
    net.weight.requires_grad_(True)  # noqa: FBT003
    whole[1] = nn.Tanh()
    assert internals.network_state([whole, net])[1] is not before[1]


def gradient_hooks() -> None:
    x = torch.zeros(2, requires_grad=True)
    assert internals.hooks_of(x) == 0
    handle = x.register_hook(lambda g: g)
    assert internals.hooks_of(x) == 1
    handle.remove()
    assert internals.hooks_of(x) == 0


def validation() -> None:
    """Of a distribution that was made while values were validated."""
    made = dist.Bernoulli(torch.tensor(0.5), validate_args=True)
    with internals.unvalidated():
        made.log_prob(torch.tensor(0.3))
    with pytest.raises(ValueError, match="support"):
        made.log_prob(torch.tensor(0.3))


def schedulers() -> None:
    """A scheduler that is told so doesn't warn of an optimiser that makes no step itself."""
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    internals.count_as_stepped(optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def waiting() -> None:
    optim = pyro.optim.Adam({"lr": 0.1})
    optim.set_state({"w": {"lr": 1.0}})
    assert internals.waiting_states(optim) == {"w": {"lr": 1.0}}


def guessing() -> None:
    """Pyro's vectorised ELBO runs the pair once more, at first."""
    runs: list[int] = []

    def model(x: Tensor) -> None:
        runs.append(1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    loss = pyro.infer.Trace_ELBO(vectorize_particles=True)
    internals.guess_plates(loss, model, lambda x: None, (torch.zeros(3),), {})
    assert (runs, loss.max_plate_nesting) == ([1], 1)


def compiler() -> None:
    """What optimisers import once there is one, in a fresh process."""
    code = """
import sys, torch
from pvae import internals
assert "torch._dynamo" not in sys.modules
internals.import_compiler()
before = set(sys.modules)
torch.optim.Adam([torch.zeros(1, requires_grad=True)])
assert "torch._dynamo" in before and set(sys.modules) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def guides() -> None:
    """A copied autoguide has the model that the first one has, which keeps it."""

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = pyro.infer.autoguide.AutoNormal(model)
    with pyro.get_param_store().scope():
        guide()
    own = guide.model
    copied: Any = internals.copied_guide(guide)
    assert copied.model is guide.model is own
    assert copied.locs.z is not guide.locs.z


def operations() -> None:
    """Each is seen with what it writes to; copies are known, and so is what is new."""
    seen: list[tuple[str, int]] = []
    into: list[Tensor] = []

    class Seeing(internals.Dispatch):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kind = "copy" if func in internals.COPIES else "other"
            kind = "fresh" if func is internals.FRESH else kind
            seen.append((kind, len(internals.tensors_in((args, kwargs)))))
            into.extend(internals.written(func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    a, b = torch.ones(2), torch.zeros(2)
    with Seeing():
        a.to(torch.float16)
        a.copy_(b)
        torch.tensor([1.0])
        torch.add(a, b, out=b)
        torch.stack([a, b])
    assert seen == [("copy", 1), ("copy", 2), ("fresh", 1), ("other", 3), ("other", 2)]
    assert [*map(id, into)] == [id(a), id(b)]


def captures() -> None:
    """An attribute by which torch remembers that it has warned; functions that builds have."""
    assert '"_warned_capturable_if_run_uncaptured"' in inspect.getsource(torch.optim.Optimizer)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    internals.allow_uncaptured(optimizer)
    assert all(hasattr(torch._C, n) for n in ("_cuda_endAllocateToPool", "_cuda_releasePool"))
    device, ended = torch.device("cuda", 0), "endAllocatePool: not currently recording"
    calls: list[Any] = []

    def end(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 1:
            raise RuntimeError(ended)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_cuda_endAllocateToPool", end)
        patch.setattr(torch._C, "_cuda_releasePool", lambda *given: calls.append(given))
        graph: Any = object()
        pool = internals.Pool((0, 7))
        internals.abandon_capture(graph, device, None)
        assert not calls
        internals.abandon_capture(graph, device, pool)  # which was ended properly
        assert calls == [(0, (0, 7))]
        internals.abandon_capture(graph, device, pool)
        assert calls == [(0, (0, 7))] * 3


CHECKS: list[Callable[[], None]] = [
    deterministic, enumerate_dim, mask, version, hooks, skipping, adam, many,
    messengers, networks, gradient_hooks, validation, schedulers, waiting, guessing, compiler,
    guides, operations, captures,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_is_as_relied_on(check: Callable[[], None]) -> None:
    check()


# Torch's compiler


def draws(x: Tensor) -> list[Tensor]:
    """Numbers of torch's generator by each of its algorithms, two of them twice alike."""
    p = x.sigmoid()
    return [
        torch.rand_like(x),
        torch.randn(3, dtype=x.dtype),
        torch.bernoulli(p),
        torch.bernoulli(p),
        nn.functional.dropout(x, 0.3),
        torch.distributions.Gamma(p, p, validate_args=False).rsample(),
        torch.poisson(p),
        torch.multinomial(p, 4, replacement=True),
        torch.randperm(5),
        x.clone().uniform_(),
    ]


@pytest.mark.slow
def test_compiled_draws_are_torchs_own() -> None:
    x = torch.randn(4, 5)
    with torch.no_grad():
        graph = make_fx(draws, tracing_mode="real")(x)
        compiled = compile_graph(graph, [x])
        torch.manual_seed(7)
        expected = draws(x)
        torch.manual_seed(7)
        found = compiled(x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(found[2], found[3])


@pytest.mark.slow
def test_what_was_compiled_is_found_in_torchs_caches(tmp_path: Path) -> None:
    """A second process compiles nothing anew."""
    code = """
import torch
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from pvae.engine.compiler import compile_graph
x = torch.ones(4)
graph = make_fx(lambda x: [torch.bernoulli(x / 2) + x.exp()], tracing_mode="real")(x)
with torch.no_grad():
    compile_graph(graph, [x])(x)
print({k: n for k, n in counters["inductor"].items() if k.startswith("fxgraph_cache")})
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        ).stdout.strip()
        for _ in range(2)
    ]
    assert found == ["{'fxgraph_cache_miss': 1}", "{'fxgraph_cache_hit': 1}"]


def test_settings_of_the_compiler_are_known() -> None:
    """An unknown one would be refused only where it compiles."""
    import torch._inductor.config as config

    assert all(hasattr(config, name) for name in OPTIONS)


def held_by(graph: GraphModule) -> list[Tensor]:
    return [getattr(graph, str(n.target)) for n in graph.graph.nodes if n.op == "get_attr"]


def test_a_recorded_graph_holds_tensors_from_outside_by_identity() -> None:
    """Which is how they become inputs; those made inside differ from run to run."""
    outside = torch.ones(2)
    graphs = [make_fx(lambda x: [x + outside])(torch.ones(2)) for _ in range(2)]
    held = [
        [getattr(g, str(n.target)) for n in g.graph.nodes if n.op == "get_attr"] for g in graphs
    ]
    assert all(isinstance(g, GraphModule) for g in graphs)
    assert [len(own) for own in held] == [1, 1]
    assert all(own[0] is outside for own in held)


# Nowhere else


def private(path: Path) -> list[str]:
    """Attributes, imports and modules in a file whose names begin with an underscore.

    Those of ``self``, ``cls`` and ``super()`` count where no class of pvae's has them.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            is_own = ast.unparse(node.value) in ("self", "cls", "super()") and node.attr in OWN
            found += [] if is_own else [f"{path.name}:{node.lineno} {ast.unparse(node)}"]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            parts = [part for name in names for part in name.split(".")]
            found += [f"{path.name}:{node.lineno} {p}" for p in parts if is_private(p)]
    return found


def is_private(name: str) -> bool:
    """Documented names begin so, too: methods of named tuples, and the end of a process."""
    documented = ("_replace", "_asdict", "_exit")
    return name.startswith("_") and not name.endswith("__") and name not in documented


def defined(path: Path) -> set[str]:
    """Private names that classes in a file give to what they define or set."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if is_private(name)}


OWN = {name for path in ROOT.rglob("*.py") for name in defined(path)}


def test_no_other_module_has_private_names() -> None:
    found = [line for p in sorted(ROOT.rglob("*.py")) if p not in HOMES for line in private(p)]
    assert not found, "; ".join(found)
    assert all(private(home) for home in HOMES)
