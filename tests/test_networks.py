"""Shapes of networks, for any image size and any leading dimensions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pvae.errors import ArgumentError, PairError
from pvae.networks import MLP, ConvDecoder, ConvEncoder


@given(
    height=st.integers(3, 33),
    width=st.integers(3, 33),
    channels=st.integers(1, 3),
    depth=st.integers(1, 3),
    residual=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_any_image_size_there_and_back(
    height: int, width: int, channels: int, depth: int, residual: bool
) -> None:
    shape = (channels, height, width)
    widths = (4, 3, 2)[:depth]
    encoder = ConvEncoder(shape, 5, widths, hidden=6, residual=residual)
    decoder = ConvDecoder(5, shape, widths[::-1], hidden=6, residual=residual)
    x = torch.rand(2, *shape)
    assert decoder(encoder(x)).shape == x.shape


@pytest.mark.parametrize("batch", [(), (4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("kind", ["mlp", "conv", "resnet"])
def test_leading_dimensions_are_a_loop(
    batch: tuple[int, ...], kind: str, device: torch.device
) -> None:
    shape = (2, 7, 5)
    if kind == "mlp":
        networks: tuple[nn.Module, nn.Module] = MLP(shape, 4), MLP(4, shape)
    else:
        residual = kind == "resnet"
        networks = (
            ConvEncoder(shape, 4, (3, 3), residual=residual),
            ConvDecoder(4, shape, (3, 3), residual=residual),
        )
    encoder, decoder = (network.to(device) for network in networks)
    x = torch.rand(*batch, *shape, device=device)
    z = encoder(x)
    assert z.shape == (*batch, 4)
    y = decoder(z)
    assert y.shape == x.shape
    flat = torch.stack([decoder(encoder(row)) for row in x.reshape(-1, *shape)])
    torch.testing.assert_close(y.reshape(-1, *shape), flat)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_context_is_joined(kind: str) -> None:
    """Integers as one-hot vectors, floating numbers as they are, both broadcast."""
    if kind == "mlp":
        network = MLP((1, 6, 6), 4, context_dim=3)
    else:
        network = ConvEncoder((1, 6, 6), 4, (3,), context_dim=3)  # type: ignore[assignment]
    x, y = torch.rand(5, 1, 6, 6), torch.tensor([0, 1, 2, 0, 1])
    out = network(x, y)
    torch.testing.assert_close(out, network(x, torch.eye(3)[y]))
    assert (out != network(x, (y + 1) % 3)).any()
    torch.testing.assert_close(network(x.expand(2, 5, 1, 6, 6), y), out.expand(2, 5, 4))


def test_bytes_go_in_scaled() -> None:
    network = MLP(4, 2, in_scale=1 / 255)
    x = torch.randint(0, 256, (3, 4), dtype=torch.uint8)
    plain = MLP(4, 2)
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(network(x), plain(x.double() / 255))


def test_a_linear_network() -> None:
    network = MLP(4, 2, hidden=())
    x = torch.rand(3, 4)
    layer = network.layers[0]
    assert isinstance(layer, torch.nn.Linear)
    torch.testing.assert_close(network(x), x @ layer.weight.T + layer.bias)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(PairError, match=r"MLP: expected input of shape.*\n.*reshape"):
        MLP(784, 2)(torch.zeros(3, 28, 28))
    with pytest.raises(PairError, match="context_dim=3"):
        MLP(4, 2, context_dim=3)(torch.zeros(5, 4))
    with pytest.raises(ArgumentError, match="channels, height, width"):
        ConvEncoder((28, 28), 2)
    with pytest.raises(ArgumentError, match=r"MLP\.hidden"):
        MLP(4, 2, hidden=(0,))
    with pytest.raises(PairError, match=r"classes from 0 to 2.*got classes from 0 to 3(.|\n)*=4"):
        MLP(4, 2, context_dim=3)(torch.zeros(4, 4), torch.arange(4))
    with pytest.raises(PairError, match=r"(?s)floating features.*integers, for classes"):
        MLP(4, 2, context_dim=1)(torch.zeros(5, 4), torch.rand(5))
