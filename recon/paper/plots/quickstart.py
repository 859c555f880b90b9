"""Figures of one run: perplexity, errors of windows, and the method itself on one window."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import MaxNLocator
from torch import nn

from recon.model.decoder import Decoder
from recon.model.structure import Halves
from recon.paper.figures import Plot, look, lower_is_better, number
from recon.paper.plots.layout import label_beside

STATES = ("dense", "pruned", "reconstructed")


def fits_on_a_page(model: Decoder) -> bool:
    """Whether one window of `model` can be reconstructed by hand: its first block has two halves, and no experts."""
    matrices = model.matrices(model.windows("block")[0])
    return isinstance(model.halves[0], Halves) and all(matrix.expert is None for matrix in matrices.values())


def perplexity(metrics: Mapping) -> Plot:
    """Perplexity of the three models, from the metrics of one run's record."""
    values = [metrics[name] for name in ("dense_perplexity", "pruned_perplexity", "perplexity")]
    data = pd.DataFrame({"state": STATES, "perplexity": values})
    fig, ax = plt.subplots(figsize=(6.3, 1.9))
    colours = [look(state)["color"] for state in STATES]
    bars = ax.barh(STATES, values, color=["0.6", "0.85", colours[2]], edgecolor=colours, height=0.65)
    bars[1].set_hatch("//")
    ax.bar_label(bars, [number(value) for value in values], padding=4, fontsize=9)
    ax.invert_yaxis()
    ax.set_xlabel("perplexity")
    lower_is_better(ax, "x")
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.1)
    dense, pruned, reconstructed = map(number, values)
    finding = f"Pruning takes perplexity from {dense} to {pruned}, reconstruction to {reconstructed}"
    share = metrics["share_recovered"]  # None where pruning did no harm
    if share is not None:
        recovered = f"{share:.0%}" if share > 0 else "none"
        finding += f": {recovered} of the damage (the rise in log-perplexity) is recovered"
    return Plot(fig, data, f"{finding}.", "Three bars.")


def errors(windows: Sequence[Mapping], pruned: Sequence[float], reconstructed: Sequence[float]) -> Plot:
    """The error of every window before and after it is fitted, and how far each model has drifted after every block.

    windows: reports of a run's windows. pruned, reconstructed: drift after each block.
    """
    kind = next(iter(windows[0]["error_before"]))
    before, after = ([window[when][kind] for window in windows] for when in ("error_before", "error_after"))
    local = pd.DataFrame({"window": [window["name"] for window in windows], "position": range(1, len(windows) + 1)})
    local = local.assign(before=before, after=after, ratio=np.divide(after, before))
    depth = pd.DataFrame({"position": range(1, len(pruned) + 1), "pruned": pruned, "reconstructed": reconstructed})
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    attention, blue = local["window"].str.endswith("attention"), look("reconstructed")["color"]
    for kind, chosen, fill in (("attention", attention, "white"), ("MLP" if attention.any() else "windows", ~attention, blue)):
        part = local[chosen]
        left.plot(part["position"], part["ratio"], "o", markersize=5, markerfacecolor=fill, markeredgecolor=blue, label=kind)
    if attention.any():
        left.legend(fontsize=8)
    left.axhline(1, color=look("pruned")["color"], linestyle="--", linewidth=1, zorder=1)
    left.annotate(
        "as pruned", (0.99, 1), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8, ha="right"
    )
    left.set_ylim(0, max(1.12, 1.1 * local["ratio"].max()))
    left.set_xlabel("window, in the order of the model")
    left.set_ylabel("error after the fit / before")
    left.set_title("Each window", fontsize=9)
    for state in STATES[1:]:
        right.plot(depth["position"], depth[state], **look(state) | {"markersize": 3.5})
        right.annotate(state, (len(depth), depth[state].iloc[-1]), (5, 0), textcoords="offset points", va="center", fontsize=8)
    right.set_ylim(bottom=0)
    right.set_xlabel("block")
    right.set_ylabel("unexplained share of variance")
    right.set_title("The model's state after each block", fontsize=9)
    for ax in (left, right):
        lower_is_better(ax)
    fig.tight_layout()
    better = int((local["ratio"] < 1).sum())
    first, last = (depth[state].iloc[-1] for state in STATES[1:])
    finding = (
        f"Fitting lowers the error of {better} of {len(local)} windows; after the last block {last:.0%} of the variance is unexplained, "
        f"without reconstruction {first:.0%}."
    )
    drawn = "Left, a ratio of errors for each window; right, two curves along the depth."
    return Plot(fig, pd.concat([local.assign(panel="windows"), depth.assign(panel="after the block")]), finding, drawn)


def method(weights: Mapping[str, np.ndarray], curve: pd.DataFrame, exact: float, name: str) -> Plot:
    """What happens to one window, and its error while it happens.

    weights: by state, the same corner (rows, columns) of one of the window's matrices.
    curve: a row per measurement of the error on held-out samples: step, error; step 0 is the pruned window.
    exact: that error where each matrix of the window is its exact least-squares solution. name: of the window.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.7), width_ratios=[1.45, 1])
    style = look("reconstructed")
    right.plot(curve["step"], curve["error"], **style | {"markersize": 4})
    start, end = curve["error"].iloc[0], curve["error"].iloc[-1]
    _drawing(left, weights, name, {"pruned": start, "reconstructed": end})
    right.axhline(start, **look("pruned") | {"marker": "", "linewidth": 1})
    names = [(curve["step"].max(), start, f"pruned {number(start)}", {"color": look("pruned")["color"]})]
    names += [(curve["step"].max(), end, f"trained {number(end)}", {"color": style["color"], "fontweight": "bold"})]
    if exact < 2 * start:
        right.axhline(exact, **look("matrix exact") | {"marker": "", "linewidth": 1.5})
        names += [(curve["step"].max(), exact, f"each matrix\nexact {number(exact)}", {"color": look("matrix exact")["color"]})]
    else:  # far above what is worth drawing
        note = f"\N{UPWARDS ARROW} each matrix exact {number(exact)}"
        right.annotate(note, (0.98, 0.93), xycoords="axes fraction", fontsize=8, ha="right")
    right.set_ylim(0, 1.15 * max(start, exact if exact < 2 * start else 0))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("optimiser step")
    right.set_ylabel("unexplained share, held-out samples")
    lower_is_better(right)
    fig.tight_layout()
    label_beside(right, names)
    steps = int(curve["step"].max())
    done = (
        f"lower its error from {number(start)} to {number(end)}"
        if end < start
        else f"do not lower its error ({number(start)}, {number(end)})"
    )
    finding = f"On held-out text, {steps} steps of gradient descent on the whole window {done}; the exact solution of each matrix by itself leaves {number(exact)}."
    corners = [
        {"panel": "weights", "state": state, "row": row, "column": column, "value": value}
        for state, corner in weights.items()
        for (row, column), value in np.ndenumerate(corner)
    ]
    levels = pd.DataFrame([{"panel": "error", "state": "each matrix exact", "value": exact}])
    data = pd.concat([curve.rename(columns={"error": "value"}).assign(panel="error"), levels, pd.DataFrame(corners)])
    return Plot(fig, data, finding, "A drawing of one window, dense, pruned and reconstructed, beside the curve of its error.")


def _drawing(ax: Axes, weights: Mapping[str, np.ndarray], name: str, errors: Mapping[str, float]) -> None:
    """Inputs, the window's three states and their outputs, from left to right; the same inputs go to all."""
    bound = np.abs(weights["dense"]).max()
    says = {
        "dense": ("dense: $W$", "target $y = f(x;\\,W)$"),
        "pruned": ("pruned: $W\\odot M$", "$f(x;\\,W\\odot M)$"),
        "reconstructed": ("reconstructed: $W'\\odot M$", "$f(x;\\,W'\\odot M)$"),
    }
    ax.text(0.45, 3.5, "$x$", fontsize=14, va="center", ha="center")
    ax.text(-0.1, 0.4, "activations of\ncalibration text\nat the window", fontsize=7.5, va="center", ha="left")
    arrow = {"arrowstyle": "-|>", "mutation_scale": 9, "color": "0.4", "linewidth": 1}
    ax.add_patch(FancyArrowPatch((0.45, 1.1), (0.45, 3.0), **arrow | {"linestyle": ":"}))
    for (state, corner), middle in zip(weights.items(), (6.1, 3.5, 0.9)):
        colour = look(state)["color"]
        shown = np.ma.masked_where(corner == 0, corner)
        place = (3.0, 4.8, middle - 0.85, middle + 0.85)
        ax.imshow(shown, cmap="PuOr", vmin=-bound, vmax=bound, extent=place, aspect="auto", zorder=2, interpolation="nearest")
        ax.add_patch(plt.Rectangle((3.0, middle - 0.85), 1.8, 1.7, fill=False, edgecolor=colour, linewidth=1.6, zorder=3))
        for start, end in (((0.8, 3.5), (2.9, middle)), ((4.9, middle), (5.8, middle))):
            ax.add_patch(FancyArrowPatch(start, end, **arrow))
        title, output = says[state]
        ax.text(3.0, middle + 0.92, title, fontsize=8.5, va="bottom", ha="left", color=colour)
        ax.text(5.9, middle, output, fontsize=9, va="center", ha="left", color=colour)
        if state in errors:
            ax.text(5.9, middle - 0.55, f"error {number(errors[state])}", fontsize=8, va="center", ha="left", color=colour)
    ax.add_patch(FancyArrowPatch((8.9, 5.8), (8.9, 0.9), **arrow | {"arrowstyle": "<|-|>", "linestyle": "--"}))
    ax.text(9.1, 3.4, "$W'$ makes\nthe difference\nsmall", fontsize=8, va="center", ha="left")
    ax.set(xlim=(-0.2, 10.9), ylim=(-0.2, 7.7), aspect="auto")
    ax.axis("off")
    ax.set_title(f"One window ({name}), and a corner of a matrix in it; pruned weights are white", fontsize=9, loc="left")


def sentences(models: Mapping[str, nn.Module], tokenizer, prompts: Sequence[str], new_tokens: int) -> pd.DataFrame:
    """What each of `models`, by state, writes after each prompt by greedy decoding: "continuation", by prompt and model."""
    rows = []
    for prompt in prompts:
        for state, model in models.items():
            tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
            found = model.generate(
                **tokens, max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.2, pad_token_id=tokenizer.eos_token_id
            )
            continuation = tokenizer.decode(found[0, tokens.input_ids.shape[1] :])
            rows.append({"prompt": prompt, "model": state, "continuation": continuation})
    return pd.DataFrame(rows).set_index(["prompt", "model"])
