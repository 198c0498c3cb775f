"""The pretend device refuses what a GPU refuses; on a GPU, this says that it is so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.device, pytest.mark.float32]


@pytest.fixture(autouse=True)
def _on_a_device(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("what is tested is the device, and this is the CPU")


OTHER: dict[str, Callable[[Tensor], object]] = {
    "add": lambda x: x + torch.ones(3, 4),
    "matmul": lambda x: x @ torch.ones(4, 2),
    "cat": lambda x: torch.cat([x, torch.ones(3, 4)]),
    "index_select": lambda x: x.index_select(0, torch.tensor([0])),
    "gather": lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
    "lerp": lambda x: x.lerp(x, torch.ones(3, 4)),
    "linear": lambda x: torch.nn.Linear(4, 2)(x),
    "out": lambda x: torch.ones(3, 4).add_(x),
    "generator": lambda x: x.normal_(generator=torch.Generator()),
    "numpy": lambda x: x.numpy(),
    "where": lambda x: torch.where(torch.ones(3, 4) > 0, x, x),
    "stack": lambda x: torch.stack([x.sum(), torch.ones(())]),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_device_is_refused(device: torch.device, name: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"device"):
        OTHER[name](torch.ones(3, 4, device=device))


def test_numbers_of_the_host_are_taken(device: torch.device) -> None:
    x = torch.arange(12.0, device=device).reshape(3, 4)
    assert torch.equal((x + torch.tensor(1.0)).cpu(), x.cpu() + 1)
    assert torch.equal(torch.where(x > 5, x, torch.tensor(0.0)).cpu(), x.cpu() * (x.cpu() > 5))
    assert torch.equal(x[torch.tensor([2])].cpu(), x.cpu()[2:])


def test_draws_are_not_the_cpus(device: torch.device) -> None:
    module = torch.get_device_module(device)
    torch.manual_seed(3)
    state = module.get_rng_state()
    first = torch.randn(100, device=device).cpu()
    assert not torch.allclose(first, torch.randn(100, generator=torch.Generator().manual_seed(3)))
    host = torch.get_rng_state()
    module.set_rng_state(state)
    assert torch.equal(torch.randn(100, device=device).cpu(), first)
    assert torch.equal(torch.get_rng_state(), host)
    own = torch.Generator(device).manual_seed(3)
    assert own.initial_seed() == 3
    assert torch.equal(torch.randn(100, generator=own, device=device).cpu(), first)


def test_no_float64_on_mps(device: torch.device) -> None:
    if device.type != "mps":
        pytest.skip("CUDA has float64")
    with pytest.raises(TypeError, match="float64"):
        torch.ones(3, device=device).double()
    with pytest.raises(TypeError, match="float64"):
        torch.ones(3, dtype=torch.float64).to(device)


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "cpu": lambda x: x.cpu(),
    "new number": lambda x: torch.tensor(3.0, device=x.device),
    "to device": lambda x: torch.ones(3).to(x.device),
    "normal": lambda x: torch.normal(x, x),
    "unique": lambda x: x.unique(),
    "cholesky": lambda x: torch.linalg.cholesky(torch.eye(3, device=x.device)),
    "host index": lambda x: x[torch.tensor([0])],
    "repeat": lambda x: torch.repeat_interleave(x.long().flatten()),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_seen(gpu: torch.device, name: str) -> None:
    x = torch.ones(3, 4, device=gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            WAITS[name](x)
        torch.zeros(3, device=gpu).add_(2.0).sum()
        torch.multinomial(x, 1)
        torch.ones(3).pin_memory().to(gpu, non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pinned_memory(gpu: torch.device) -> None:
    pinned = torch.arange(4.0).pin_memory()
    assert pinned.is_pinned()
    assert pinned[1:].is_pinned()
    assert not torch.arange(4.0).is_pinned()
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        pinned.to(gpu).pin_memory()


def test_graphs(gpu: torch.device) -> None:
    """A capture runs nothing; each replay does, with numbers of its own; waits are refused."""
    total, by = torch.zeros(3, device=gpu), torch.ones(3, device=gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += by
        noise = torch.randn(3, device=gpu)
    assert torch.equal(total.cpu(), torch.zeros(3))
    torch.manual_seed(1)
    graph.replay()
    first = noise.clone()
    by.fill_(2.0)
    graph.replay()
    assert torch.equal(total.cpu(), torch.full((3,), 3.0))
    assert not torch.equal(noise, first)
    torch.manual_seed(1)
    graph.replay()
    torch.testing.assert_close(noise, first, rtol=0, atol=0)


def test_a_capture_that_fails(gpu: torch.device) -> None:
    """It leaves its stream current and the generator in the graph."""
    before = torch.cuda.current_stream()
    spare = torch.cuda.default_generators[0].clone_state()
    with (
        pytest.raises(RuntimeError, match="previous error during capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        torch.ones(3, device=gpu).sum().item()
    try:
        assert torch.cuda.current_stream() != before
        with pytest.raises(RuntimeError, match="Offset increment outside graph capture"):
            torch.randn(3, device=gpu)
    finally:
        torch.cuda.set_stream(before)
        torch.cuda.default_generators[0].graphsafe_set_state(spare)
    assert torch.randn(3, device=gpu).isfinite().all()


def test_fused_optimisers_take_a_float32_rate(gpu: torch.device) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=gpu))
    p.grad = torch.ones(3, device=gpu)
    for dtype in (torch.float32, torch.float64):
        rate = torch.tensor(0.1, dtype=dtype, device=gpu)
        step = torch.optim.Adam([p], lr=rate, fused=True, capturable=False).step
        if dtype == torch.float64:
            with pytest.raises(RuntimeError, match="expected scalar type Float but found Double"):
                step()
        else:
            step()
    assert torch.allclose(p.detach().cpu(), torch.full((3,), 0.9))
