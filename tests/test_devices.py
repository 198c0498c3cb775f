"""Devices: which are refused, what one without float64 keeps of its digits, how runs move."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvae
from pvae import bounds, checkpoint, diagnostics, randomness, recipes
from pvae.data import as_source
from pvae.devices import as_device, automatic, beside, double
from pvae.engine.sums import add_to, set_sums, sums_of, zero_sums
from pvae.errors import ArgumentError, PvaeWarning

D, N = 6, 40
backends: Any = torch.backends  # of which torch's types don't know all


def data() -> Tensor:
    return torch.rand(N, D, generator=torch.Generator().manual_seed(1))


def autoencoder() -> pvae.VAE:
    """A pair without draws, so that its numbers are the same on every device."""
    with randomness.forked(2):
        return recipes.ae(D, 2, hidden=(5,), likelihood="gaussian")


def fit(pair: object, x: object, **options: object) -> pvae.Fit:
    settings: dict[str, object] = {"batch_size": N, "epochs": 2, "progress": False, "lr": 1e-2}
    return pvae.fit(pair, x, **{**settings, **options})  # type: ignore[arg-type]


# Refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'; got 'gpu'"),
        ("CUDA", "or 'mps'; got 'CUDA'"),
        ("cuda:-1", "or 'mps'; got 'cuda:-1'"),
        ("", "or 'mps'; got ''"),
        (1.5, "or 'mps'; got 1.5"),
        ("xpu", "the CPU, CUDA or Apple's MPS, which pairs run on; got 'xpu'"),
        ("hpu:0", "which pairs run on; got 'hpu:0'"),
        ("meta", "which pairs run on; got 'meta'"),
        (torch.device("xla"), "which pairs run on; got 'xla'"),
        ("cuda:7", "a device of this machine, which has 'cpu'.*; got 'cuda:7'"),
        (torch.device("mps:1"), "a device of this machine, which has 'cpu'.*; got 'mps:1'"),
        ("cpu:1", "a device of this machine, which has 'cpu'.*; got 'cpu:1'"),
    ],
)
@pytest.mark.parametrize("tool", ["fit", "elbo", "as_source"])
def test_what_is_no_device_for_pairs_is_refused_in_a_line(
    tool: str, name: object, message: str
) -> None:
    run: dict[str, Callable[[], object]] = {
        "fit": lambda: fit(autoencoder(), data(), device=name),
        "elbo": lambda: bounds.elbo(autoencoder(), data(), device=name),  # type: ignore[arg-type]
        "as_source": lambda: as_source(data(), device=name),  # type: ignore[arg-type]
    }
    with pytest.raises(ArgumentError, match=rf"^device: expected .*{message}\.\n  Try: device="):
        run[tool]()


def test_a_pair_without_values_is_refused() -> None:
    with pytest.raises(ArgumentError, match="tensors with values; got some on the device 'meta'"):
        fit(autoencoder().to("meta"), data(), device="cpu")


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has MPS and no CUDA, as far as questions go."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("mps")
def test_where_auto_is_on_a_mac() -> None:
    wide = [torch.zeros(2, dtype=torch.float32), torch.zeros(2, dtype=torch.float64)]
    assert automatic(wide[:1]) == torch.device("mps")
    assert automatic(wide) == torch.device("cpu")
    assert automatic([torch.zeros(1, dtype=torch.complex128)]) == torch.device("cpu")
    assert automatic(wide[:1], processes=2) == torch.device("cpu")
    assert as_device("mps") == torch.device("mps")


@pytest.mark.usefixtures("mps")
@pytest.mark.parametrize("part", ["weights", "a buffer", "the default type"])
def test_float64_is_refused_on_mps(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvae.randomness.get_state", dict)
    monkeypatch.setattr("pvae.randomness.set_state", lambda _: None)
    pair: object = autoencoder().float() if part == "a buffer" else autoencoder()
    if part == "a buffer":
        assert isinstance(pair, pvae.VAE)
        pair.model.register_buffer("scale", torch.ones((), dtype=torch.float64))
    if part == "the default type":
        pair = (lambda x: None, lambda x: None)
    with pytest.raises(ArgumentError, match=r"a pair in float32 on 'mps', .*; got torch\.float64"):
        fit(pair, data(), device="mps")


# Sums


def sums_in_float32() -> Tensor:
    """Sums as a device without float64 has them."""
    return torch.zeros(2, 3, dtype=torch.float32)


def test_sums_in_two_numbers_have_float64s_digits() -> None:
    terms = torch.rand(20000, 3, generator=torch.Generator().manual_seed(0)).float()
    terms *= torch.tensor([1e6, -1e-3, 1.0])
    terms[::7] *= -3.0
    sums, plain = sums_in_float32(), torch.zeros(3, dtype=torch.float32)
    for row in terms:
        add_to(sums, row)
        plain += row
    exact = torch.tensor([math.fsum(column.tolist()) for column in terms.T])
    assert torch.allclose(sums_of(sums), exact, rtol=1e-11, atol=0)
    assert not torch.allclose(plain.double(), exact, rtol=1e-7, atol=0)


def test_sums_go_from_one_kind_of_device_to_another() -> None:
    values, sums = torch.tensor([1 / 3, 1e8 + 1e-3, 0.0]), sums_in_float32()
    set_sums(sums, values)
    assert torch.allclose(sums_of(sums), values, rtol=1e-13, atol=0)
    back = zero_sums(torch.device("cpu"), 3)
    set_sums(back, sums_of(sums))
    assert torch.equal(back, sums_of(sums))


# On the device at hand


@pytest.mark.device
@pytest.mark.float32
def test_a_training_has_the_cpus_numbers(device: torch.device) -> None:
    here, cpu = fit(autoencoder(), data(), device=device), fit(autoencoder(), data(), device="cpu")
    for row, expected in zip(here.history, cpu.history, strict=True):
        for name in ("loss", "log_likelihood", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.device
@pytest.mark.float32
def test_data_in_float64_are_taken_in_the_pairs_type(device: torch.device, tmp_path: Path) -> None:
    x = data().double().numpy()
    np.save(tmp_path / "x.npy", x)
    expected = bounds.elbo(autoencoder(), x, device="cpu").mean
    for given in (x, torch.from_numpy(x), np.load(tmp_path / "x.npy", mmap_mode="r")):
        run = fit(autoencoder(), given, device=device, epochs=1, batch_size=16)
        assert run.structure.device.type == device.type
        found = bounds.elbo(autoencoder(), given, device=device)
        assert found.mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.device
@pytest.mark.float32
def test_a_run_goes_on_bit_for_bit(device: torch.device, tmp_path: Path) -> None:
    def pair() -> pvae.VAE:
        with randomness.forked(3):
            return recipes.vae(D, 2, hidden=(5,), likelihood="gaussian")

    options = {"device": device, "batch_size": 16, "clip_norm": 1.0}
    whole, half, rest = pair(), pair(), pair()
    fit(whole, data(), epochs=4, **options)
    fit(half, data(), epochs=2, folder=tmp_path, **options)
    saved = checkpoint.load(tmp_path / "checkpoint.safetensors")
    if device.type != "cpu":
        assert any(name.startswith(f"rng.{device.type}") for name in saved.tensors)
    with randomness.forked(9):
        fit(rest, data(), epochs=4, folder=tmp_path, resume=True, **options)
    for name, parameter in rest.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


@pytest.mark.device
@pytest.mark.float32
def test_a_run_moves_between_the_device_and_the_cpu(device: torch.device, tmp_path: Path) -> None:
    if device.type == "cpu":
        pytest.skip("there is no other device to move to")
    alone = fit(autoencoder(), data(), epochs=3, device="cpu")
    for first, second in ((str(device), "cpu"), ("cpu", str(device))):
        folder = tmp_path / first
        fit(autoencoder(), data(), epochs=1, folder=folder, device=first)
        with pytest.warns(PvaeWarning, match=f"device was {first}, is {second}"):
            run = fit(autoencoder(), data(), epochs=3, folder=folder, resume=True, device=second)
        assert run.history[-1]["loss"] == pytest.approx(alone.history[-1]["loss"], rel=1e-5)


@pytest.mark.device
@pytest.mark.float32
def test_estimates_are_in_float64(device: torch.device) -> None:
    with randomness.forked(3):
        pair = recipes.vae(D, 2, hidden=(5,), likelihood="gaussian")
    weights = bounds.log_weights(pair.to(device), data(), 3)
    assert weights.dtype == torch.float64
    wide = double(torch.ones(2, device=device))
    assert wide.dtype == torch.float64
    assert (wide.device.type == device.type) is (device.type != "mps")
    assert beside(torch.ones(1, device=device), wide).device == wide.device


@pytest.mark.device
@pytest.mark.float32
@pytest.mark.usefixtures("store")
def test_what_is_masked_out_has_no_rank(device: torch.device) -> None:
    x, mask = data().to(device), data() > 0.3

    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample(
                "x", dist.Normal(z[..., None] * x.new_ones(D), 1.0).mask(mask).to_event(1), obs=x
            )

    def guide(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 0.5))

    found = diagnostics.pit((model, guide), (x, mask.to(device)), num_particles=20)
    assert torch.equal(found.values.isnan(), ~mask)


# What float32 is computed in


def set_both_ways() -> None:
    """After this torch refuses to say how precise products are, but for each kind by itself."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_tf32 = False


def old_way() -> None:
    torch.set_float32_matmul_precision("high")


def new_way() -> None:
    backends.fp32_precision = "tf32"


@pytest.fixture
def _precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for part in (backends, backends.cuda.matmul, backends.mkldnn.matmul):
        part.fp32_precision = "none"


@pytest.mark.device
@pytest.mark.float32
@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("settings", [old_way, new_way, set_both_ways])
def test_a_resumed_run_says_that_products_are_in_tf32(
    settings: Callable[[], None], device: torch.device, tmp_path: Path
) -> None:
    fit(autoencoder(), data(), epochs=1, folder=tmp_path, device=device)
    path = tmp_path / "checkpoint.safetensors"
    assert checkpoint.load(path).meta["environment"]["float32_matmul"] == "ieee"
    settings()
    changed = checkpoint.environment(device)["float32_matmul"]
    assert changed == ("ieee" if device.type == "cuda" and settings is set_both_ways else "tf32")
    expected = (
        contextlib.nullcontext()
        if changed == "ieee"
        else pytest.warns(
            PvaeWarning, match="not bit for bit as before: .*float32_matmul was ieee, is tf32"
        )
    )
    with expected:
        fit(autoencoder(), data(), epochs=2, folder=tmp_path, resume=True, device=device)
