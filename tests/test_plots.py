"""Pictures: what is drawn, from the artists' own data."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import pvae
from pvae import plots, recipes
from pvae.diagnostics import learning_curve as judge
from pvae.errors import UndefinedError
from pvae.fitting import History


def drawn(figure: Figure) -> None:
    """Renders, so that layout errors show."""
    figure.savefig(BytesIO(), format="png")


def images_of(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for axis in figure.axes for image in axis.images]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 64), (5, 8, 8)),
        ((5, 1, 7, 9), (5, 7, 9)),
        ((5, 3, 7, 9), (5, 7, 9, 3)),
        ((5, 7, 9), (5, 7, 9)),
    ],
)
def test_as_images(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert plots.as_images(torch.zeros(shape)).shape == expected
    assert plots.as_images(np.zeros((5, 63)), (7, 9)).shape == (5, 7, 9)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(UndefinedError, match="event_shape="):
        plots.as_images(np.zeros((5, 63)))


def test_originals_stand_above_reconstructions() -> None:
    x = torch.rand(12, 16)
    figure = plots.reconstructions(x, x / 2, num=4)
    found = images_of(figure)
    assert len(found) == 8
    for i in range(4):
        np.testing.assert_allclose(found[i].flatten(), x[i].float().numpy())
        np.testing.assert_allclose(found[4 + i].flatten(), x[i].float().numpy() / 2)
    drawn(figure)


def test_samples_and_colours() -> None:
    figure = plots.samples(torch.rand(7, 3, 4, 4), columns=3, title="seven")
    assert len(images_of(figure)) == 7
    assert figure.get_suptitle() == "seven"
    drawn(figure)


def test_the_training_curve_has_what_the_history_has() -> None:
    records = [
        {
            "epoch": e,
            "elbo": -10.0 + e,
            "valid_elbo": -11.0 + e,
            "rate": 1.0 * e,
            "valid_rate": None,
        }
        for e in range(6)
    ]
    figure = plots.training_curve(History(records))
    lines = {line.get_label(): line for axis in figure.axes for line in axis.lines}
    assert set(lines) == {"elbo", "valid_elbo", "rate"}
    ys = np.asarray(lines["valid_elbo"].get_ydata(), dtype=float)
    np.testing.assert_allclose(ys, np.arange(6) - 11.0)
    drawn(figure)
    drawn(plots.training_curve(History([{"epoch": 0, "log_joint": -3.0}])))
    drawn(plots.training_curve(History()))


def test_the_latent_map() -> None:
    z, y = torch.randn(30, 2), torch.arange(30) % 3
    figure = plots.latent_map(z, y)
    (points,) = figure.axes[0].collections
    np.testing.assert_allclose(np.asarray(points.get_offsets()), z.numpy())
    np.testing.assert_array_equal(points.get_array(), y.numpy())
    drawn(figure)
    wide = plots.latent_map(torch.randn(30, 5) * torch.tensor([0.1, 5.0, 0.1, 0.1, 0.1]))
    offsets = np.asarray(wide.axes[0].collections[0].get_offsets())
    assert offsets[:, 0].std() > 10 * offsets[:, 1].std()  # principal axes, largest first
    named = plots.latent_map(z, np.array(["cat", "dog", "owl"])[y.numpy()])
    drawn(named)
    assert [t.get_text() for t in named.axes[1].get_yticklabels()] == ["cat", "dog", "owl"]
    drawn(plots.latent_map(z, torch.linspace(0, 1, 30)))
    with pytest.raises(UndefinedError, match="2 or more"):
        plots.latent_map(torch.randn(30, 1))


def test_two_latent_maps_side_by_side() -> None:
    figure = plots.Picture()
    left, right = figure.subplots(1, 2)
    z = torch.randn(30, 2)
    assert plots.latent_map(z, axis=left, title="AE") is figure
    plots.latent_map(z + 1, axis=right)
    offsets = [np.asarray(a.collections[0].get_offsets()) for a in (left, right)]
    np.testing.assert_allclose(offsets[1], offsets[0] + 1, rtol=1e-6)
    assert left.get_title() == "AE"
    drawn(figure)


def test_a_grid_with_labels() -> None:
    rows = {"clean": torch.zeros(3, 16), "restored": torch.ones(2, 16)}
    figure = plots.grid(rows, "of size 4")
    labels = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert labels == ["clean", "restored"]
    assert sum(axis.get_visible() for axis in figure.axes) == 5
    drawn(figure)
    with pytest.raises(UndefinedError, match="at least one image"):
        plots.grid([])


def test_the_manifold_is_decoded_at_the_priors_quantiles() -> None:
    seen = []

    def decode(z: np.ndarray) -> torch.Tensor:
        seen.append(z)
        return torch.zeros(len(z), 16)

    figure = plots.manifold(decode, num=3)
    assert images_of(figure)[0].shape == (12, 12)
    quantile = 0.9674216  # of N(0, 1) at 5/6
    assert seen[0][0] == pytest.approx([-quantile, quantile], abs=1e-6)
    assert seen[0][4] == pytest.approx([0.0, 0.0])
    drawn(figure)
    assert figure._repr_png_().startswith(b"\x89PNG")  # notebooks show it without set-up
    vae = recipes.vae(16, 2, hidden=(8,))
    drawn(plots.manifold(vae.decode, num=3))
    colour = plots.manifold(lambda z: torch.rand(len(z), 3, 4, 4), num=2)
    assert images_of(colour)[0].shape == (8, 8, 3)
    drawn(colour)


def test_the_training_curve_takes_a_fit() -> None:
    ae = recipes.ae(6, 2, hidden=(4,))
    run = pvae.fit(ae, torch.rand(20, 6).round(), epochs=2, progress=False)
    figure = plots.training_curve(run)
    assert len(figure.axes) == 1  # a point mass has no rate
    assert [line.get_label() for line in figure.axes[0].lines] == ["log_joint"]
    drawn(figure)


def test_a_learning_curve_has_its_noise_as_a_band() -> None:
    values = 0.5 * torch.arange(40.0) + torch.randn(40, generator=torch.Generator().manual_seed(0))
    found = judge([{"elbo": float(v)} for v in values])
    figure = plots.learning_curve(found)
    (axis,) = figure.axes
    curve, line = axis.lines
    assert np.array_equal(np.asarray(curve.get_xdata()), np.arange(40))
    np.testing.assert_allclose(np.asarray(curve.get_ydata()), values)
    fitted = np.polyfit(np.arange(30, 40), values[-10:].numpy().astype(float), 1)
    np.testing.assert_allclose(np.asarray(line.get_ydata()), np.polyval(fitted, np.arange(30, 40)))
    (band,) = axis.collections
    low, high = band.get_paths()[0].get_extents().get_points()[:, 1]
    assert high - low == pytest.approx(4 * found.noise + 9 * found.slope)
    drawn(figure)
