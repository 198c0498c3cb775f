"""Pictures: each function returns a matplotlib figure; none touches pyplot's global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pvae.errors import UndefinedError, check_int

__all__ = [
    "Picture",
    "as_images",
    "latent_map",
    "manifold",
    "reconstructions",
    "samples",
    "training_curve",
]


class Picture(Figure):
    """A matplotlib figure that notebooks show without any set-up."""

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def as_images(x: Any, event_shape: Sequence[int] | None = None) -> np.ndarray:
    """Data as images, shape ``(N, H, W)`` or ``(N, H, W, 3)``.

    Vectors whose length is a square number are taken as square images.

    Arguments:
        x: Array or tensor, shape ``(N, *event_shape)``.
        event_shape: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``, where x doesn't tell.

    Raises:
        UndefinedError: If the data are no images.

    Example:
        >>> as_images(np.zeros((5, 64))).shape
        (5, 8, 8)
    """
    array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float32)
    if event_shape is not None:
        array = array.reshape(len(array), *event_shape)
    if array.ndim == 2 and math.isqrt(array.shape[1]) ** 2 == array.shape[1]:
        side = math.isqrt(array.shape[1])
        return array.reshape(-1, side, side)
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return array[:, 0] if array.shape[1] == 1 else array.transpose(0, 2, 3, 1)
    if array.ndim == 3:
        return array
    raise UndefinedError(
        "picture of data",
        "images: shape (N, H, W), (N, 1 or 3, H, W), or (N, a square number)",
        f"shape {array.shape}",
        ["event_shape=(H, W)"],
    )


def _grid(rows: Sequence[np.ndarray], title: str, labels: Sequence[str] = ()) -> Picture:
    """Rows of images, on one grey scale."""
    columns = max(len(row) for row in rows)
    height = 0.75 * len(rows) + 0.4
    width = 0.75 * columns + (0.8 if labels else 0.1)
    figure = Picture(figsize=(width, height), dpi=100, layout="constrained")
    low = min(float(row.min()) for row in rows)
    high = max(float(row.max()) for row in rows)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for i, row in enumerate(rows):
        for j in range(columns):
            axis = axes[i][j]
            axis.set_xticks([])
            axis.set_yticks([])
            if j >= len(row):
                axis.set_visible(False)
                continue
            image = (row[j] - low) / max(high - low, 1e-12) if row[j].ndim == 3 else row[j]
            axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        if i < len(labels):
            axes[i][0].set_ylabel(labels[i], rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def reconstructions(
    x: Any, reconstructed: Any, num: int = 10, event_shape: Sequence[int] | None = None
) -> Picture:
    """Originals above their reconstructions.

    Arguments:
        x: Data, shape ``(N, *event_shape)``.
        reconstructed: What came back, the same shape; means, as `pvae.VAE.reconstruct` gives.
        num: How many.
        event_shape: Where x doesn't tell that it is images.
    """
    check_int("num", num)
    rows = [as_images(part[:num], event_shape) for part in (x, reconstructed)]
    return _grid(rows, "originals and their reconstructions (means)", ["x", "E[x | z]"])


def samples(
    x: Any,
    columns: int = 10,
    event_shape: Sequence[int] | None = None,
    title: str = "samples from the model (draws of x)",
) -> Picture:
    """A grid of samples; the title says whether they are draws or means.

    Arguments:
        x: Samples, shape ``(N, *event_shape)``.
        columns: Images a row.
        event_shape: Where x doesn't tell that it is images.
        title: What they are.
    """
    check_int("columns", columns)
    images = as_images(x, event_shape)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    return _grid(rows, title)


def training_curve(history: Any) -> Picture:
    """The bound over epochs, in training and validation, and its rate.

    Arguments:
        history: A `pvae.fitting.History`, or records with the same names.
    """
    records = list(history)
    figure = Picture(figsize=(7, 3), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [r["epoch"] for r in records]
    for axis, names, title in (
        (left, ("elbo", "log_joint"), "nats per datum"),
        (right, ("rate",), "rate, nats per datum"),
    ):
        for name in names:
            for key, style in ((name, "-"), (f"valid_{name}", "--")):
                points = [(e, r[key]) for e, r in zip(epochs, records, strict=True)
                          if r.get(key) is not None]  # fmt: skip
                if points:
                    axis.plot(*zip(*points, strict=True), style, label=key)
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=9)
        if axis.lines:
            axis.legend(fontsize=8)
    if len(records) > 4:  # the first epochs are off the scale of all others
        lowest = sorted(v for line in left.lines for v in line.get_ydata()[len(records) // 10 :])
        if lowest:
            span = lowest[-1] - lowest[0]
            left.set_ylim(lowest[0] - 0.05 * span - 1e-6, lowest[-1] + 0.05 * span + 1e-6)
    return figure


def latent_map(codes: Any, labels: Any = None) -> Picture:
    """Codes in the plane, coloured by label; of more dimensions, the first two principal axes.

    Arguments:
        codes: Shape ``(N, latent_dim)``.
        labels: Classes, shape ``(N,)``.
    """
    z = np.asarray(codes.detach().cpu() if hasattr(codes, "detach") else codes)
    figure = Picture(figsize=(5, 4.5), dpi=100, layout="constrained")
    axis = figure.subplots()
    if z.ndim != 2 or z.shape[1] < 2:
        raise UndefinedError("latent map", "codes of shape (N, 2 or more)", f"{z.shape}")
    names = ("z[0]", "z[1]")
    if z.shape[1] > 2:
        z = z - z.mean(0)
        z = z @ np.linalg.svd(z, full_matrices=False)[2][:2].T
        names = ("first principal axis of z", "second")
    if labels is None:
        axis.scatter(z[:, 0], z[:, 1], s=4)
    else:
        y = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
        points = axis.scatter(z[:, 0], z[:, 1], c=y, s=4, cmap="tab10")
        figure.colorbar(points, ax=axis, ticks=np.unique(y) if len(np.unique(y)) < 20 else None)
    axis.set_xlabel(names[0])
    axis.set_ylabel(names[1])
    axis.set_title("codes: means of q(z | x)", fontsize=9)
    axis.set_aspect("equal")
    return figure


def manifold(
    decode: Callable[[Any], Any],
    num: int = 15,
    event_shape: Sequence[int] | None = None,
) -> Picture:
    """What a two-dimensional latent decodes to, at the quantiles of a standard normal.

    Arguments:
        decode: From latents, shape ``(N, 2)``, to data; such as ``vae.decode``.
        num: Steps along each axis.
        event_shape: Where the decoded data don't tell that they are images.
    """
    from statistics import NormalDist

    quantiles = [NormalDist().inv_cdf((i + 0.5) / check_int("num", num)) for i in range(num)]
    z = np.array([(a, b) for b in reversed(quantiles) for a in quantiles], dtype=np.float32)
    images = as_images(decode(z), event_shape)
    rows = [np.concatenate(list(images[i : i + num]), axis=1) for i in range(0, num * num, num)]
    figure = Picture(figsize=(5, 5), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.imshow(np.concatenate(rows, axis=0), cmap="gray", interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title("decoded manifold: E[x | z] at quantiles of N(0, I)", fontsize=9)
    return figure
