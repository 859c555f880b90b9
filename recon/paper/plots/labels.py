"""Names beside lines, instead of a legend."""

from collections.abc import Sequence

from matplotlib.axes import Axes


def beside(ax: Axes, ends: Sequence[tuple[float, float, str, dict]], size: float = 7.5) -> None:
    """Writes each name to the right of `ax` at the height of its line's end, names moved apart where they would overlap.

    ends: (x, y, name, text properties) of each line's last point. Call it once scales, limits and the place of the axes are final.
    """
    if not ends:
        return
    low, high = ax.get_window_extent().intervaly
    places = [(ax.transData.transform((x, y))[1] - low) / (high - low) for x, y, _, _ in ends]
    most = max(name.count("\n") for _, _, name, _ in ends) + 1
    gap = 1.25 * most * size / 72 * ax.figure.dpi / (high - low)  # the highest name, as a share of the height
    for (x, y, name, properties), place in zip(ends, apart(places, gap)):
        ax.annotate(
            name, (x, y), xytext=(1.03, place), xycoords="data", textcoords="axes fraction", fontsize=size, va="center",
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6, "shrinkB": 3}, **properties,
        )  # fmt: skip


def apart(places: Sequence[float], gap: float) -> list[float]:
    """`places`, moved as little as need be, in their order, so that neighbours are at least `gap` apart."""
    order = sorted(range(len(places)), key=places.__getitem__)
    groups: list[tuple[float, list[int]]] = []  # the middle of a run of places that touch, and its members
    for index in order:
        groups.append((places[index], [index]))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (len(groups[-1][1]) + len(groups[-2][1])) / 2 - 1e-12:
            (upper, above), (lower, below) = groups.pop(), groups.pop()
            middle = (upper * len(above) + lower * len(below)) / (len(above) + len(below))
            groups.append((middle, below + above))
    found = dict.fromkeys(order, 0.0)
    for middle, members in groups:
        found |= {index: middle + gap * (number - (len(members) - 1) / 2) for number, index in enumerate(members)}
    return [found[index] for index in range(len(places))]
