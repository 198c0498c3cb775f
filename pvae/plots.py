"""Pictures: each function returns a matplotlib figure; none touches pyplot's global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pvae.annotations import strict
from pvae.errors import ArgumentError, DataError, UndefinedError, as_shape, check_int, quoted, shown

if TYPE_CHECKING:
    from pvae.diagnostics import SBC, TARP, AggregatedPosterior, LearningCurve
    from pvae.fitting import Fit, History

Array: TypeAlias = Tensor | np.ndarray | Sequence[object]
Record: TypeAlias = Mapping[str, float | None]
Shape: TypeAlias = Sequence[int] | None

__all__ = [
    "Picture",
    "aggregated_posterior",
    "as_images",
    "calibration",
    "grid",
    "latent_map",
    "learning_curve",
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


def _figure(width: float, height: float) -> Picture:
    return Picture(figsize=(width, height), dpi=100, layout="constrained")


@strict
def as_images(x: Array, event_shape: Shape = None) -> np.ndarray:
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
    array = _numpy(x).astype(np.float32)
    if event_shape is not None:
        array = array.reshape(len(array), *as_shape("event_shape", event_shape))
    if array.ndim == 2 and math.isqrt(array.shape[1]) ** 2 == array.shape[1]:
        side = math.isqrt(array.shape[1])
        return array.reshape(-1, side, side)
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return array[:, 0] if array.shape[1] == 1 else array.transpose(0, 2, 3, 1)
    if array.ndim == 3:
        return array
    expected = "images: shape (N, H, W), (N, 1 or 3, H, W), or (N, a square number)"
    fixes = ["event_shape=(H, W)"]
    raise UndefinedError("picture of data", expected, f"shape {array.shape}", fixes)


def _plain(text: object) -> str:
    """A name as it is: no maths between dollar signs, no control characters."""
    return shown(str(text)).replace("$", r"\$")


def _numpy(x: Array) -> np.ndarray:
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x)


@strict
def grid(
    rows: Mapping[str, Array] | Sequence[Array], title: str = "", event_shape: Shape = None
) -> Picture:
    """Rows of images on one grey scale.

    Arguments:
        rows: Data of each row, shape ``(N, *event_shape)``; in a mapping, by the row's label.
        title: Above them.
        event_shape: Where the data don't tell that they are images.
    """
    labels = list(rows) if isinstance(rows, Mapping) else []
    several = list(rows.values()) if isinstance(rows, Mapping) else rows
    images = [as_images(row, event_shape) for row in several]
    columns = max(map(len, images), default=0)
    if not columns:
        raise UndefinedError("grid", "at least one image", "none", ["rows of data"])
    low = min(float(row.min()) for row in images)
    high = max(float(row.max()) for row in images)
    margin = 0.1 + 0.08 * max(map(len, labels)) if labels else 0.1
    figure = _figure(0.75 * columns + margin, 0.75 * len(images) + 0.4)
    axes = figure.subplots(len(images), columns, squeeze=False)
    for line, row in zip(axes, images, strict=True):
        for axis in line[len(row) :]:
            axis.set_visible(False)
        for axis, image in zip(line, row, strict=False):
            axis.set(xticks=[], yticks=[])
            image = (image - low) / max(high - low, 1e-12) if image.ndim == 3 else image
            axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    for line, label in zip(axes, labels, strict=False):
        line[0].set_ylabel(_plain(label), rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


@strict
def reconstructions(
    x: Array, reconstructed: Array, num: int = 10, event_shape: Shape = None
) -> Picture:
    """Originals above their reconstructions.

    Arguments:
        x: Data, shape ``(N, *event_shape)``.
        reconstructed: What came back, the same shape; means, as `pvae.VAE.reconstruct` gives.
        num: How many.
        event_shape: Where x doesn't tell that it is images.
    """
    check_int("num", num)
    rows = {"x": x[:num], "E[x | z]": reconstructed[:num]}
    return grid(rows, "originals and their reconstructions (means)", event_shape)


@strict
def samples(
    x: Array,
    columns: int = 10,
    event_shape: Shape = None,
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
    rows = [x[i : i + columns] for i in range(0, len(x), columns)]
    return grid(rows, title, event_shape)


def training_curve(history: History | Fit | Sequence[Record]) -> Picture:
    """The bound (or what is in its place) over epochs, in training and validation, and its rate.

    Arguments:
        history: A `pvae.fitting.History`, a `pvae.Fit`, or records with the same names.
    """
    records = history if isinstance(history, Sequence) else getattr(history, "history", "")
    if isinstance(records, (str, bytes)):
        expected = "a fit, its history, or records of its epochs"
        raise ArgumentError("history", expected, quoted(history), ["history=run.history"])
    panels = {
        "nats per datum": _curves(records, _VALUES),
        "rate, nats per datum": _curves(records, ("rate",)),
    }
    panels = {title: curves for title, curves in panels.items() if curves} or {"no epoch yet": {}}
    figure = _figure(3.5 * len(panels), 3)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for name, points in curves.items():
            axis.plot(
                *zip(*points, strict=True), "--" if "valid" in name else "-", label=_plain(name)
            )
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=9)
        if curves:
            axis.legend(fontsize=8)
        _leave_out_the_start(axis, len(records))
    return figure


@strict
def learning_curve(result: LearningCurve) -> Picture:
    """A learning curve, and the line fitted to its end with two standard deviations of noise.

    Arguments:
        result: What `pvae.diagnostics.learning_curve` returned.
    """
    values, window = result.values.numpy(), result.window
    epochs = np.arange(len(values))
    late = epochs[-window:]
    line = values[-window:].mean() + result.slope * (late - late.mean())
    figure = _figure(4, 3)
    axis = figure.subplots()
    axis.plot(epochs, values, ".-", lw=0.8, label=_plain(result.name))
    axis.plot(late, line, label=f"{result.state}, last {window} epochs")
    band = 2 * result.noise
    axis.fill_between(late, line - band, line + band, alpha=0.3, label="2 sd of an epoch's noise")
    axis.set_ylabel("nats per datum", fontsize=8)
    axis.set_xlabel("epoch")
    axis.legend(fontsize=8)
    _leave_out_the_start(axis, len(values))
    return figure


_VALUES = ("elbo", "log_joint", "unnormalised_elbo")


def _curves(
    records: Sequence[Record], names: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """Epochs and values by column, in training and validation, of columns that have any."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for key in [key for name in names for key in (name, f"valid_{name}")]:
        for record in records:
            epoch, value = record["epoch"], record.get(key)
            if epoch is not None and value is not None:
                curves.setdefault(key, []).append((epoch, value))
    return curves


def _leave_out_the_start(axis: Axes, epochs: int) -> None:
    """Where the first tenth of the epochs is off the scale of the rest, says so and cuts it off."""
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axis.lines]
    late = [v for y in lines for v in y[epochs // 10 :]]
    if epochs < 10 or not late:
        return
    span = max(late) - min(late)
    if min(v for y in lines for v in y) < min(late) - span:
        axis.set_ylim(min(late) - 0.05 * span, max(late) + 0.05 * span)
        axis.set_xlabel("epoch (the first ones are below)")


@strict
def latent_map(
    codes: Array,
    labels: Array | None = None,
    *,
    axis: Axes | None = None,
    title: str = "codes: means of q(z | x)",
) -> Figure:
    """Codes in the plane, coloured by label; of more dimensions, the first two principal axes.

    Arguments:
        codes: Shape ``(N, latent_dim)``.
        labels: Classes (numbers or names) or real numbers, shape ``(N,)``.
        axis: Where to draw, such as one of ``figure.subplots(1, 2)``; None for a new figure.
        title: Above it.
    """
    z = _numpy(codes)
    if z.ndim != 2 or z.shape[1] < 2:
        fixes = ["latent.codes(pair, x), of a pair with two entries in its latent or more"]
        raise UndefinedError("latent map", "codes of shape (N, 2 or more)", f"{z.shape}", fixes)
    if not len(z) or not np.isfinite(z).all():
        actual = "no rows" if not len(z) else "NaN or infinity"
        raise DataError("codes", "finite codes, of one row or more", actual, ["codes of data"])
    if labels is not None and np.shape(labels_of := _numpy(labels)) != z.shape[:1]:
        expected, actual = f"{len(z)} labels, one for each code", f"shape {labels_of.shape}"
        raise DataError("labels", expected, actual, ["labels=None"])
    axis = _figure(5, 4.5).subplots() if axis is None else axis
    figure = axis.get_figure(root=True)
    assert figure is not None  # noqa: S101
    names = ("z[0]", "z[1]")
    if z.shape[1] > 2:
        z = z - z.mean(0)
        z = z @ np.linalg.svd(z, full_matrices=False)[2][:2].T
        names = ("first principal axis of z", "second")
    if labels is None:
        axis.scatter(z[:, 0], z[:, 1], s=4)
    else:
        _scatter(axis, figure, z, _numpy(labels))
    axis.set(xlabel=names[0], ylabel=names[1], aspect="equal")
    axis.set_title(title, fontsize=9)
    return figure


def _scatter(axis: Axes, figure: Figure, z: np.ndarray, labels: np.ndarray) -> None:
    """Points coloured by label: by class where there are at most 20, else on a scale."""
    classes, numbers = np.unique(labels, return_inverse=True)
    are_whole = labels.dtype.kind not in "f" or bool((labels == labels.round()).all())
    is_classes = len(classes) <= 20 and are_whole
    colours = labels if labels.dtype.kind in "biuf" else numbers
    palette = "tab10" if is_classes else "viridis"
    points = axis.scatter(z[:, 0], z[:, 1], c=colours, s=4, cmap=palette)
    bar = figure.colorbar(points, ax=axis, ticks=np.unique(colours) if is_classes else None)
    if is_classes:
        bar.ax.set_yticklabels([_plain(name) for name in classes])


@strict
def calibration(result: SBC | TARP) -> Picture:
    """How far the distribution function of ranks is from the uniform one, with its band.

    Above 0 on the left and below it on the right, q is too narrow; the other way round, too wide.

    Arguments:
        result: A `pvae.diagnostics.SBC` or `pvae.diagnostics.TARP`.
    """
    tests = result.tests
    points = tests.points.numpy()
    figure = _figure(4.5, 3.2)
    axis = figure.subplots()
    low, high = tests.lower.numpy() - points, tests.upper.numpy() - points
    axis.fill_between(points, low, high, color="0.85", label="95% of exact guides", step="mid")
    order = np.argsort(tests.p_values.numpy(), kind="stable")
    for rank, column in enumerate(order):
        label = f"{_plain(result.names[column])}, p = {float(tests.p_values[column]):.2g}"
        style = {"label": label} if rank < 5 else {"color": "0.6", "linewidth": 0.5, "zorder": 1}
        axis.plot(points, tests.ecdf[:, column].numpy() - points, **style)
    axis.set(xlabel="rank of the latent among the guide's draws", ylabel="ECDF - uniform")
    axis.legend(fontsize=7)
    axis.set_title(f"{type(result).__name__}, {len(result.ranks)} simulations", fontsize=9)
    return figure


@strict
def aggregated_posterior(result: AggregatedPosterior, num: int = 6) -> Picture:
    """Draws of q(z) over draws of p(z), for the dimensions that differ most, and correlations.

    Arguments:
        result: A `pvae.diagnostics.AggregatedPosterior`.
        num: How many dimensions.
    """
    shown = np.argsort(-result.ks.numpy(), kind="stable")[: check_int("num", num)]
    figure = _figure(2.2 * (len(shown) + 1), 2.4)
    *axes, last = figure.subplots(1, len(shown) + 1, squeeze=False)[0]
    for axis, d in zip(axes, shown, strict=True):
        q, p = (x[:, d].cpu().numpy() for x in (result.draws, result.prior))
        bins = np.histogram_bin_edges(np.concatenate([q, p]), 30)
        axis.hist(p, bins, density=True, color="0.8", label="p(z)")
        axis.hist(q, bins, density=True, histtype="step", label="q(z)")
        axis.set_title(f"{_plain(result.names[d])}, KS {float(result.ks[d]):.2f}", fontsize=9)
        axis.set_yticks([])
    axes[0].legend(fontsize=7)
    image = last.imshow(result.correlation.cpu().numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    last.set_title("correlation under q(z)", fontsize=9)
    last.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=last)
    return figure


@strict
def manifold(
    decode: Callable[[np.ndarray], Array], num: int = 15, event_shape: Shape = None
) -> Picture:
    """What a two-dimensional latent decodes to, at the quantiles of a standard normal.

    With another prior these are just places in the latent space.

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
    whole = np.concatenate(rows, axis=0)
    if whole.ndim == 3:
        whole = (whole - whole.min()) / max(float(whole.max() - whole.min()), 1e-12)
    figure = Picture(figsize=(5, 5), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.imshow(whole, cmap="gray", interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title("decoded manifold: E[x | z] at quantiles of N(0, I)", fontsize=9)
    return figure
