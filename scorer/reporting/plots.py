"""Arrays -> pictures, and pictures -> inline SVG or files. Knows matplotlib; neither runs nor pages.

Call everything here inside `style()`. Many points are counted into cells and drawn as an image, so that the size of a
picture does not grow with the number of records.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scorer.printing import printable
from scorer.storage.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
Interval = tuple[float | None, float | None, float | None]  # value, low and high; None where there is none

INK = "#23272f"  # becomes the page's own text colour
COLOURS = ("#3d85c6", "#e07b27", "#2fa070", "#a06cd5", "#d1495b", "#8a8f98")  # readable on white and on black
MAX_POINTS = 3_000  # more are counted into cells
MAX_LABEL = 24  # characters of a name that fit into a picture
MAX_BINS = 60  # fewer for few records: twice the square root of their number
DRAWN_QUANTILES = (0.001, 0.999)  # a distribution is drawn between them
STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (5.6, 3.5),
    "font.size": 9.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "scorer",  # the same scores give the same bytes
    "text.color": INK,
    "text.parse_math": False,  # names of runs and columns are not formulas
    "xtick.color": INK,
    "ytick.color": INK,
}


def style() -> AbstractContextManager[None]:
    """The settings of every picture."""
    from matplotlib import rc_context

    return rc_context(STYLE)  # type: ignore[arg-type]


def distributions(series: Mapping[str, Floats], name: str, *, log: bool, mark: float | None = None) -> Figure:
    """Histograms of [n] values each, by label, as shares of each series; `mark` draws a line at a value."""
    figure, axes = _axes(name, "share of records")
    bins = min(MAX_BINS, 2 * math.ceil(math.sqrt(max(map(len, series.values())))))
    edges = _edges(np.concatenate([*series.values()]), log, bins)
    for i, (label, values) in enumerate(series.items()):
        share = np.histogram(values, edges)[0] / len(values)
        colour = COLOURS[i % len(COLOURS)]
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.45 if len(series) == 1 else 0.16)
        axes.stairs(share, edges, color=colour, linewidth=1.4, label=label)
    if mark is not None and edges[0] < mark < edges[-1]:
        axes.axvline(mark, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    if log:
        _log(axes, "x")
    axes.set_ylim(bottom=0)
    if len(series) > 1:
        axes.legend()
    return figure


def cloud(
    x: Floats, y: Floats, names: tuple[str, str], *, log: tuple[bool, bool], medians: bool = False, equal: bool = False
) -> Figure:
    """Two values of [n] records against each other. medians: draw those of y along x; equal: draw y = x."""
    figure, axes = _axes(*names)
    edges = [_edges(values, is_log) for values, is_log in zip((x, y), log, strict=True)]
    if len(x) <= MAX_POINTS:
        alpha = 0.75 if len(x) < 300 else 0.35
        axes.scatter(x, y, s=9, color=COLOURS[0], alpha=alpha, linewidths=0, rasterized=True)
    else:
        from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb

        # From nearly transparent to opaque, which is readable on a light and on a dark page.
        shades = LinearSegmentedColormap.from_list("ink", [(*to_rgb(COLOURS[0]), 0.12), (*to_rgb(COLOURS[0]), 1.0)])
        counts = np.histogram2d(x, y, edges)[0].T
        mesh = axes.pcolormesh(
            *edges, np.where(counts > 0, counts, np.nan), cmap=shades, norm=LogNorm(), rasterized=True
        )
        bar = figure.colorbar(mesh, ax=axes, label="records", pad=0.02, fraction=0.05)
        bar.outline.set_visible(False)
        _plain(bar.ax, "y")
    for axis, of in zip("xy", log, strict=True):
        if of:
            _log(axes, axis)
    if medians:
        middle = _medians(x, y, edges[0])
        if len(middle[0]) > 1:
            axes.plot(*middle, color=COLOURS[1], linewidth=1.8, label="median")
            axes.legend()
    if equal:
        low, high = max(edges[0][0], edges[1][0]), min(edges[0][-1], edges[1][-1])
        if low < high:
            axes.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    return figure


def curves(x: Sequence[float], series: Mapping[str, Sequence[Interval]], names: tuple[str, str]) -> Figure:
    """Lines through the values at each x, in percent, by label; their intervals are shaded."""
    figure, axes = _axes(*names)
    for i, (label, rows) in enumerate(series.items()):
        value, low, high = np.array(rows, dtype=np.float64).T
        colour = COLOURS[i // 2 % len(COLOURS)]  # each pair has two lines: overlap, and IoU dashed
        axes.plot(x, value, color=colour, marker="o", markersize=3, linestyle="--" if i % 2 else "-", label=label)
        if np.isfinite(low).any():
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, [at / 100 for at in x], color=INK, linewidth=0.8, linestyle=":", label="overlap by chance")
    axes.set_ylim(0, 1)
    axes.set_xlim(0, None)
    axes.legend()
    return figure


def intervals(rows: Mapping[str, Interval], name: str) -> Figure:
    """Values with their intervals by label, the first on top, and a line at 0."""
    figure, axes = _axes(name, "")
    figure.set_figheight(1 + 0.4 * len(rows))
    values, lows, highs = np.array([*rows.values()], dtype=np.float64).T
    places = np.arange(len(rows))
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.hlines(places, lows, highs, color=COLOURS[0], linewidth=1.8)
    axes.plot(values, places, color=COLOURS[0], marker="o", markersize=5, linestyle="")
    axes.set_yticks(places, [shortened(printable(label)) for label in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def group_sizes(sizes: Floats, taken: Mapping[str, Floats]) -> Figure:
    """Sizes of [k] groups, the largest first, and by label how many records were taken from each."""
    figure, axes = _axes("cluster, by size", "records")
    edges = np.arange(len(sizes) + 1) + 0.5
    many = len(sizes) > MAX_POINTS
    axes.stairs(sizes, edges, fill=True, color=COLOURS[5], alpha=0.35, label="in the cluster", rasterized=many)
    for i, (label, counts) in enumerate(taken.items()):
        middle = np.arange(len(sizes)) + 1
        axes.scatter(middle, counts, s=9, color=COLOURS[i], linewidths=0, label=label, rasterized=many)
    axes.set_yscale("symlog", linthresh=1)
    _plain(axes, "y")
    axes.set_ylim(-0.2, None)
    axes.legend()
    return figure


def shortened(name: str) -> str:
    """The name as far as it fits into a picture."""
    return name if len(name) <= MAX_LABEL else f"{name[:MAX_LABEL]}…"


def inline(figure: Figure, name: str) -> str:
    """The picture as an <svg> element in the page's text colour, for screen readers labelled by the id title-NAME."""
    svg = _render(figure, "svg", transparent=True).decode()
    svg = svg[svg.index("<svg") :].strip().replace(INK, "currentColor")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)  # one page has many pictures
    return svg.replace("<svg ", f'<svg role="img" aria-labelledby="title-{name}" ', 1)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write FOLDER/NAME.svg and FOLDER/NAME.png, on white."""
    for suffix in ("svg", "png"):
        with replacing(folder / f"{name}.{suffix}") as temporary:
            temporary.write_bytes(_render(figure, suffix, facecolor="white"))


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    return figure, axes


def _log(axes: Axes, axis: str) -> None:
    """A log scale labelled with plain numbers, more densely where it spans less."""
    from matplotlib.ticker import LogLocator, NullFormatter

    getattr(axes, f"set_{axis}scale")("log")
    scale = getattr(axes, f"{axis}axis")
    low, high = getattr(axes, f"get_{axis}lim")()
    subs = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 15 else (1, 2, 5) if high / low < 200 else (1,)
    scale.set_major_locator(LogLocator(subs=subs))
    scale.set_minor_formatter(NullFormatter())
    _plain(axes, axis)


def _plain(axes: Axes, axis: str) -> None:
    from matplotlib.ticker import FuncFormatter

    getattr(axes, f"{axis}axis").set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _edges(values: Floats, log: bool, bins: int = MAX_BINS) -> Floats:
    low, high = map(float, np.quantile(values, DRAWN_QUANTILES))
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    return np.geomspace(low, high, bins + 1) if log else np.linspace(low, high, bins + 1)


def _medians(x: Floats, y: Floats, edges: Floats) -> tuple[Floats, Floats]:
    """The medians of x and y in cells of three bins of x that hold at least 10 records."""
    cells = np.searchsorted(edges[::3], x)
    held = [cells == i for i in range(1, len(edges[::3])) if (cells == i).sum() >= 10]
    return np.array([np.median(x[of]) for of in held]), np.array([np.median(y[of]) for of in held])


def _render(figure: Figure, suffix: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
    figure.savefig(buffer, format=suffix, metadata=metadata, **options)
    return buffer.getvalue()
