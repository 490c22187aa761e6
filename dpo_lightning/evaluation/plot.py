"""The picture of reward against KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import hypot
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

from dpo_lightning.errors import UsageError
from dpo_lightning.evaluation.points import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["linear", "sqrt"]
Line = str | tuple[float, tuple[float, ...]]
# Okabe and Ito's colours, told apart by the colour-blind; the yellow is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MORE = ("inferno", 0.1, 0.65)  # colormap, and the part of it that is like none of these, for further methods
PALEST = 0.55  # grey of bounds, of which the first are black
APART = 26  # points between places whose names are written beside them
WIDTH = 44  # characters of a line of the legend
MARKERS = "osD^vPX*<>"
MARKERS_OF_BOUNDS = "dph8"
DASHES: tuple[Line, ...] = ("--", ":", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)))


def draw(points: Sequence[Point], scale: Scale = "linear") -> Figure:
    """Reward against KL: a colour a method, a marker a run, bounds of KL dashed and grey; bars are standard errors.

    Args:
        points: At least one.
        scale: Of the KL.

    Raises:
        UsageError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError('Pictures need matplotlib: pip install -c constraints.txt -e ".[plot]".') from None
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    of_methods = colours(points)
    for place, (method, colour) in enumerate(of_methods.items()):
        _draw_method(axes, [point for point in points if point.method == method], colour, place)
    if scale == "sqrt":
        axes.set_xscale("function", functions=(_signed_root, _signed_square))
    axes.margins(x=0.09)  # room for the names of points at KL 0
    axes.set_xlabel("KL to the reference, nats a sample" + (" (square-root scale)" if scale == "sqrt" else ""))
    axes.set_ylabel("mean reward of samples")
    _name_bounds(axes, points, of_methods)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9, borderaxespad=0,
                title="bars: one standard error", title_fontsize=8, alignment="left")  # fmt: skip
    return figure


def colours(points: Sequence[Point]) -> dict[str, str]:
    """A colour for each method, no two alike: first black and greys for those whose KL is a bound, then the others.

    Within both the order is that in which they come.
    """
    bounds = list(dict.fromkeys(point.method for point in points if point.kl_is_bound))
    methods = list(dict.fromkeys(point.method for point in points if not point.kl_is_bound))
    greys = [f"#{round(255 * PALEST * place / max(1, len(bounds) - 1)):02x}" for place in range(len(bounds))]
    found = {method: grey + 2 * grey[1:] for method, grey in zip(bounds, greys, strict=True)}
    return found | dict(zip(methods, [*COLOURS, *_more(len(methods) - len(COLOURS))], strict=False))


def _more(count: int) -> list[str]:
    """Colours beyond the first ones."""
    if count <= 0:
        return []
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    name, low, high = MORE
    return [to_hex(colormaps[name](low + (high - low) * (place + 0.5) / count)) for place in range(count)]


def _draw_method(axes: Any, points: Sequence[Point], colour: str, place: int) -> None:
    bounds = sorted((point for point in points if point.kl_is_bound), key=lambda point: point.kl)
    if bounds:
        marker, line = MARKERS_OF_BOUNDS[place % len(MARKERS_OF_BOUNDS)], DASHES[place % len(DASHES)]
        _draw_run(axes, bounds, f"{bounds[0].method} (KL: upper bound)", colour, marker, line)
    runs = dict.fromkeys(point.label for point in points if not point.kl_is_bound)
    for index, label in enumerate(runs):
        own = [point for point in points if point.label == label and not point.kl_is_bound]
        own.sort(key=lambda point: -1 if point.step is None else point.step)
        name = f"{own[0].method} {label}".strip()
        _draw_run(axes, own, name, colour, MARKERS[index % len(MARKERS)], "-")


def _name_bounds(axes: Any, points: Sequence[Point], of_methods: Mapping[str, str]) -> None:
    """Names beside points, those of larger KL first, where they have room; the axes have their scale and limits."""
    axes.get_xlim(), axes.get_ylim()  # finds the limits, which are found no sooner
    places: list[tuple[float, float]] = []
    for point in sorted((point for point in points if point.kl_is_bound), key=lambda point: -point.kl):
        x, y = axes.transData.transform((point.kl, point.reward))
        if all(hypot(x - left, y - low) >= APART * axes.figure.dpi / 72 for left, low in places):
            places.append((x, y))
            axes.annotate(point.label, (point.kl, point.reward), xytext=(-4, 4), fontsize=7,
                          textcoords="offset points", ha="right", color=of_methods[point.method])  # fmt: skip


def _draw_run(axes: Any, points: Sequence[Point], name: str, colour: str, marker: str, line: Line) -> None:
    axes.errorbar(
        [point.kl for point in points],
        [point.reward for point in points],
        xerr=[point.kl_se or 0.0 for point in points],
        yerr=[point.reward_se or 0.0 for point in points],
        label=fill(name, WIDTH),
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=1.0,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=0.8,
        alpha=0.9,
    )


def _signed_root(kl: Any) -> Any:
    import numpy as np

    return np.sign(kl) * np.sqrt(np.abs(kl))


def _signed_square(root: Any) -> Any:
    import numpy as np

    return np.sign(root) * root**2
