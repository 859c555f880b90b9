"""Panels, and labels beside what is drawn in place of legends, moved so that none covers another."""

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SIZE = 8  # points


def pattern_words(pattern: str) -> str:
    """A pattern as titles name it: "50 %" for "0.5", "2:4" as it is."""
    return pattern if ":" in pattern else f"{100 * float(pattern):g} %"


def panels(count: int, size: tuple[float, float], columns: int = 2, wspace: float = 0.3, **options) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of this size in inches, up to `columns` beside one another; `options` as of `plt.subplots`."""
    columns = min(count, columns)
    rows = -(-count // columns)
    spaced = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": wspace, "hspace": 0.45}
    whole = size[0] * (columns + wspace * (columns - 1)), size[1] * (rows + 0.45 * (rows - 1))
    fig, axes = plt.subplots(rows, columns, figsize=whole, squeeze=False, gridspec_kw=spaced, **options)
    for ax in axes.flat[count:]:
        ax.remove()
    return fig, list(axes.flat[:count])


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in the order of `wanted`, and as near to them (least squares) as that allows."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    groups: list[tuple[float, int]] = []  # what moves together: sum of the places, each less the gaps below it, and count
    for rank, index in enumerate(order):
        total, count = wanted[index] - rank * gap, 1
        while groups and groups[-1][0] / groups[-1][1] >= total / count:
            total, count = total + groups[-1][0], count + groups[-1][1]
            groups.pop()
        groups.append((total, count))
    means = [total / count for total, count in groups for _ in range(count)]
    return [place for _, place in sorted((index, means[rank] + rank * gap) for rank, index in enumerate(order))]


def label_ends(ax: Axes, place: float, labels: Mapping[str, float], side: str = "right") -> None:
    """Writes each label to the "left" or "right" of `place` and its value, moved up or down where labels are close.

    Limits and scales have to be set before."""
    to_points = 72 / ax.figure.dpi
    heights = [ax.transData.transform((place, value))[1] * to_points for value in labels.values()]
    shift, align = {"left": (-7, "right"), "right": (5, "left")}[side]
    for (text, value), old, new in zip(labels.items(), heights, apart(heights, 1.25 * SIZE), strict=True):
        offset = {"xytext": (shift, new - old), "textcoords": "offset points"}
        ax.annotate(text, (place, value), **offset, va="center", ha=align, fontsize=SIZE)


def label_beside(ax: Axes, ends: Sequence[tuple[float, float, str, dict]]) -> None:
    """Writes the name of each line beside `ax` at the height of its end, with a thin line to it: for ends at different places.

    ends: (x, y, name, text properties). Limits and scales have to be set before."""
    low, high = ax.get_window_extent().intervaly
    heights = [(ax.transData.transform((x, y))[1] - low) / (high - low) for x, y, _, _ in ends]
    lines = max((name.count("\n") + 1 for _, _, name, _ in ends), default=1)
    gap = 1.25 * SIZE * lines / 72 * ax.figure.dpi / (high - low)
    pointer = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.6, "shrinkB": 3}
    for (x, y, name, properties), height in zip(ends, apart(heights, gap), strict=True):
        place = {"xytext": (1.03, height), "textcoords": "axes fraction", "annotation_clip": False, "arrowprops": pointer}
        ax.annotate(name, (x, y), **place, va="center", fontsize=SIZE, **properties)


def label_points(ax: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes each label beside its point, where it covers least of marks, upright and level lines, and other labels; with a line to it
    where it is far or aslant, or another point is nearer.

    Limits and scales have to be set before."""
    pixels = ax.figure.dpi / 72
    places = {text: ax.transData.transform(point) for text, point in points.items()}
    taken = [(x - 5 * pixels, y - 5 * pixels, x + 5 * pixels, y + 5 * pixels) for x, y in places.values()]
    for line in ax.lines:
        ends = line.get_transform().transform(line.get_xydata())
        (left, bottom), (right, top) = ends.min(0), ends.max(0)
        if min(right - left, top - bottom) < 1:
            taken.append((left - 2 * pixels, bottom - 2 * pixels, right + 2 * pixels, top + 2 * pixels))
    # What is preferred comes first: above, below, right, left, then aslant.
    sides = [(0, 1), (0, -1), (1, 0), (-1, 0), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8)]
    for text, (x, y) in sorted(places.items(), key=lambda item: tuple(item[1])):
        box = ax.text(0, 0, text, fontsize=SIZE)
        width, height = box.get_window_extent().width, box.get_window_extent().height
        box.remove()
        choices = []
        for far in (8, 16, 24, 34, 46):
            for rank, (right, up) in enumerate(sides):
                middle = x + right * (far * pixels + width / 2), y + up * (far * pixels + height / 2)
                new = (middle[0] - width / 2, middle[1] - height / 2, middle[0] + width / 2, middle[1] + height / 2)
                inside = _shared(new, (ax.bbox.x0, ax.bbox.y0, ax.bbox.x1, ax.bbox.y1))
                bad = sum(_shared(new, other) for other in taken) + width * height - inside
                unclear = any(_from(new, other) <= _from(new, (x, y)) for name, other in places.items() if name != text)
                choices.append(
                    (20 * bad / height + (far + rank + 8 * unclear) * pixels, unclear or far > 8 or rank > 3, middle, new)
                )
        _, away, middle, new = min(choices)
        taken.append(new)
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4} if away else None
        offset = {"xytext": ((middle[0] - x) / pixels, (middle[1] - y) / pixels), "textcoords": "offset points"}
        ax.annotate(text, points[text], **offset, ha="center", va="center", fontsize=SIZE, arrowprops=line)


def _from(box: tuple, point: Sequence[float]) -> float:
    """How far a point is from a box (left, bottom, right, top)."""
    return math.hypot(*(max(box[axis] - point[axis], 0, point[axis] - box[axis + 2]) for axis in (0, 1)))


def _shared(one: tuple, other: tuple) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
