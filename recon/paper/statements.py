"""What the paper claims, as data: which runs each claim compares, and how."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from recon.paper.comparisons import COSTS, MARGIN
from recon.paper.runs import MEASURES

# Group -> what it is about, where the paper (arXiv 2510.14444) says so, and what to know when reading the verdicts.
GROUPS = {
    "1": ("Reconstruction recovers quality", "abstract", "Samples are not cut into chunks."),
    "2": (
        "From half a block up, the size of the window hardly matters",
        "abstract; Figure 1, Table 3",
        "Learning rates follow a rule, not a search: the larger the window, the smaller (`recon.methods.fit.SLOWING`). For the whole model as one "
        "window it is too slow: at three times that rate it is better (one seed), so what it loses is in part the rule's doing. Samples are not cut "
        "into chunks, so that windows of every size make the same few steps.",
    ),
    "3": (
        "Single matrices are worse",
        "abstract; Figure 1, Table 3",
        "The learning rate of single matrices is a tenth of that of half-blocks, the best of four that were tried at one seed "
        "(`recon.methods.fit.SINGLE`).",
    ),
    "4": ("Single matrices are worse even at their exact optimum", "abstract; Figure 1, Table 3", ""),
    "5a": (
        "Reconstruction is as good as retraining on the same samples",
        "Table 1, Figure 3",
        f"As good means: worse by {MARGIN:g} of the damage at most. Retraining also adapts the model to the calibration text, so perplexity on "
        "that kind of text favours it; another text and the divergence from the dense model do not. Reconstruction also reads two held-out samples, "
        "to roll back windows that got worse, and the criterion sees 32; neither is in the number of samples.",
    ),
    "5b": (
        "Reconstruction is as good as retraining with ten times the samples, and compute",
        "abstract (over an order of magnitude); Table 1, Figure 3 (131,072 samples against 2,048; 13.6 to 130 times the time)",
        "The first version of the paper (v1) claims that reconstruction is better than full retraining, the third (v3) that it matches it.",
    ),
    "6": (
        "Reconstruction followed by retraining is better than either alone",
        "Table 1, Figure 3",
        "With as many samples, both together take the compute of both. Only the rows on compute say whether that is worth it.",
    ),
    "7": ("With reconstruction, the pruning criterion matters less", "abstract; Table 4, Figure 5", ""),
    "8": ("After reconstruction, the gap between criteria shrinks with model size", "abstract; Table 4, Figure 5", ""),
    "9": ("Propagation does not matter", "Appendix B", ""),
    "10": ("The loss does not matter", "Appendix B", ""),
    "11": ("Adapters inside the window are enough", "v3: it holds with parameter-efficient training, too", ""),
}

CENTRAL = ("masklora", "full")  # ways to retrain that the paper centres on
# Names as they are spelled in sentences.
SPELLED = {
    "masklora": "MaskLoRA", "lora": "LoRA", "scalelora": "ScaleLoRA", "full": "full retraining", "norms": "retraining of norms",
    "magnitude": "magnitude", "wanda": "Wanda",
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """One comparison of two sides. `ours` and `other` are the options, by flat name, that differ from the defaults; a tuple of values
    stands for several runs, `other` None for the same runs before reconstruction."""

    id: str
    """Its group, and what distinguishes it there: "2.block"."""
    statement: str
    kind: str
    """The name of a function in `recon.paper.comparisons.KINDS`."""
    ours: dict
    other: dict | None = None
    measure: str = "own"
    """What is compared: see `recon.paper.runs.MEASURES`."""
    cost: str = ""
    """What a ratio, or a combination, is of: samples or flops."""
    count: int = 0
    times: int = 1
    """Of `samples`: those that our side trains on, and how many times as many the other."""
    above: float = 0.0
    """The effect must exceed it."""
    margin: float = 0.0
    """By which two sides may differ and still be equal, or ours be worse and still as good; as a share of the damage."""
    noise: bool = True
    """Training noise could decide it, so that it takes several seeds."""
    optional: bool = False
    """Not central to the paper: left out of the README, and of the page where there are no records."""

    @property
    def group(self) -> str:
        return self.id.partition(".")[0]

    @property
    def bar(self) -> float:
        """What the effect must exceed; 0 for an equivalence, which has two."""
        return self.above if self.kind == "equal" else self.above - self.margin

    @property
    def level(self) -> float:
        """Of the interval that decides: one-sided tests against a margin at 5 % each, or a two-sided one against a bar."""
        return 0.90 if self.margin else 0.95

    @property
    def comparison(self) -> str:
        """Which runs against which, in words."""
        other = "the same before reconstruction" if self.other is None else _words(self.other)
        return {
            "ratio": f"{COSTS.get(self.cost)} with which {other} reaches the quality of {_words(self.ours)}",
            "gap": f"gap between criteria: {_words(self.ours)}, against {other}",
            "trend": f"gap between criteria against model size: {_words(self.ours)}",
        }.get(self.kind, f"{_words(self.ours)} against {other}")


def _words(options: dict) -> str:
    return ", ".join(f"{name} {' / '.join(value) if isinstance(value, tuple) else value}" for name, value in options.items())


def _claims() -> Iterator[Claim]:
    half, alone, whole = {"granularity": "half-block"}, {"granularity": "none"}, {"chunks": 1}
    for measure, words in MEASURES.items():
        said = f"Half-blocks reconstructed are better than the pruned model ({words})"
        yield Claim(f"1.{measure}", said, "better", half | whole, measure=measure, noise=False)
    for coarse in ("block", "2-blocks", "4-blocks", "8-blocks", "quarter", "model"):
        ours, other = half | whole, {"granularity": coarse} | whole
        yield Claim(f"2.{coarse}", f"Half-block equals {coarse}", "equal", ours, other, margin=MARGIN)
    matrix = {"granularity": "matrix"} | whole
    yield Claim("3", "Half-block is better than single matrices (AdamW)", "better", half | whole, matrix)
    exact = matrix | {"solver": "exact"}
    yield Claim("4", "Half-block is better than single matrices solved exactly", "better", half | whole, exact)
    methods = ("masklora", "full", "lora", "scalelora", "norms")
    for group, times, more in (("5a", 1, "as many"), ("5b", 10, "ten times as many or more")):
        for method, count in itertools.product(methods, (2, 8, 32)):
            for measure, words in MEASURES.items():
                said = f"Reconstruction with {count} samples is as good as {SPELLED[method]} with {more} ({words})"
                yield Claim(
                    f"{group}.{method}.{count}.{measure}", said, "samples", half, alone | {"retrain": method}, measure,
                    count=count, times=times, margin=MARGIN, optional=method not in CENTRAL,
                )  # fmt: skip
    for method, cost in itertools.product(methods, COSTS):
        said = f"{SPELLED[method]} needs more than 10 times the {COSTS[cost]} for the quality of reconstruction"
        yield Claim(
            f"5b.{method}.{cost}", said[0].upper() + said[1:], "ratio", half, alone | {"retrain": method},
            cost=cost, above=10, optional=method not in CENTRAL,
        )  # fmt: skip
    for method in ("masklora", "lora", "scalelora", "full", "norms"):
        both, optional = half | {"retrain": method}, method != "masklora"
        for than, other in (("reconstruction", half), ("retraining", alone | {"retrain": method})):
            name = than if than == "reconstruction" else SPELLED[method]
            said = f"Reconstruction, then {SPELLED[method]}, is better than {name} alone"
            yield Claim(
                f"6.{method}.{than}.flops",
                f"{said} with no more compute",
                "combined",
                both,
                other,
                cost="flops",
                optional=optional,
            )
            for count in (8, 32):
                with_samples = f"{said} at {count} samples"
                yield Claim(f"6.{method}.{than}.{count}", with_samples, "samples", both, other, count=count, optional=optional)
    for criterion in ("magnitude", "wanda"):
        said = f"The gap between {SPELLED[criterion]} and SparseGPT is smaller after reconstruction than before"
        yield Claim(f"7.{criterion}", said, "gap", half | {"criterion": (criterion, "sparsegpt")})
    criteria = half | {"criterion": ("magnitude", "wanda", "sparsegpt")}
    yield Claim("8", "The gap between criteria after reconstruction shrinks with model size", "trend", criteria)
    for loss in ("mse", "cosine", "whitened"):
        for propagation in ("sparse", "mixed"):
            ours, other = ({"propagation": name, "loss": loss} | half for name in (propagation, "dense"))
            said = f"Propagation {propagation} equals dense ({loss})"
            yield Claim(f"9.{propagation}.{loss}", said, "equal", ours, other, margin=MARGIN)
    for propagation in ("dense", "sparse", "mixed"):
        for loss in ("cosine", "whitened"):
            ours, other = ({"propagation": propagation, "loss": name} | half for name in (loss, "mse"))
            said = f"{loss.capitalize()} loss equals mean squared error ({propagation} propagation)"
            yield Claim(f"10.{loss}.{propagation}", said, "equal", ours, other, margin=MARGIN)
    for adapter in ("masklora", "lora", "scalelora"):
        ours, other = half | {"adapter": adapter}, half | {"adapter": "none"}
        said = f"Windows trained through {SPELLED[adapter]} equal windows trained in full"
        yield Claim(f"11.{adapter}", said, "equal", ours, other, margin=MARGIN, optional=adapter != "masklora")


CLAIMS = tuple(_claims())
