"""Every option, one frozen dataclass per concern; `recon.study.spec.RunSpec` and the command line are made of them.

An option is a field with its type, its default, and its help beside it. Its name is the same everywhere: in Python, on the
command line (`--sequence-length`), in records and tables. Values are checked when a config is made.
"""

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Annotated, Literal, get_args, get_origin

from recon.errors import ReconError
from recon.kernels.adapters import ADAPTERS
from recon.kernels.criteria import CRITERIA
from recon.kernels.gradient_descent import RATES, Schedule
from recon.kernels.losses import LOSSES, POSITIONS
from recon.kernels.patterns import SCOPES, Pattern
from recon.model.windows import Window, canonical

# The tokens that a length of 0 stands for; fewer if the model was made for shorter sequences.
LENGTHS = {"sequence_length": 512, "evaluation_length": 256}
PROTOCOLS = {
    "samples": "every text window begins as the tokenizer begins a text",
    "joined": "the text is tokenised at once and cut, so only the first window begins as a text does (published perplexities)",
}
# Shared by the published recipes: one learning rate for windows of any size, samples are not cut, nothing is rolled back.
_PUBLISHED = {
    "loss": "mse", "first_position": "full", "train": "all", "rate": "absolute", "size_power": 0.0, "matrix_rate": 1.0,
    "chunks": 1, "roll_back": False,
}  # fmt: skip
# Recipes: values for options that are left at their defaults. fast, default, best and distil differ in the time they take;
# first-skipped is an earlier default. The others follow published code, but do not set the calibration text or its size.
PRESETS: dict[str, dict] = {
    "fast": {"samples": 32},
    "default": {},
    "first-skipped": {"first_position": "skipped"},
    "best": {"start": "exact", "exact_iterations": 4, "epochs": 2},
    "distil": {"retrain": "masklora", "retrain_objective": "distil"},
    # sparsegpt_block_size 0: SparseGPT prunes as many columns at once as there are samples.
    "paper": {
        "statistics": "sparse", "sparsegpt_block_size": 0,
        "propagation": "dense", "learning_rate": 1e-4, "epochs": 1, "batch_size": 2, **_PUBLISHED,
    },
    "ebft": {
        "statistics": "sparse", "granularity": "block", "propagation": "sparse", "learning_rate": 2e-4, "weight_decay": 0.1,
        "warmup": 0.0, "epochs": 10, "batch_size": 8, **_PUBLISHED,
    },
    "3basil-tm": {
        "criterion": "admm", "statistics": "sparse", "granularity": "block", "propagation": "sparse", "learning_rate": 2e-5,
        "warmup": 0.0, "epochs": 20, "batch_size": 8, **_PUBLISHED,
    },
    "alps": {"criterion": "admm", "statistics": "sparse", "granularity": "none"},
    "sparsegpt": {"criterion": "sparsegpt", "statistics": "sparse", "granularity": "none"},
    "wanda": {"criterion": "wanda", "statistics": "sparse", "granularity": "none"},
    "wanda++": {"criterion": "wanda++", "statistics": "sparse", "granularity": "none"},
}  # fmt: skip
SOURCES = {
    "fast": "half of the default's samples, in half of the time",
    "default": "the defaults of this library",
    "first-skipped": "the default before December 2026, used by many records here: samples' first positions are skipped",
    "best": "starts from masked least-squares solutions, and passes over the samples twice",
    "distil": "the default, then the whole model learns the dense model's predictions; it has to fit into memory",
    "paper": "arXiv 2510.14444, github.com/ZIB-IOL/Free-Lunch-in-LLM-Compression, 601ea9e; its learning rates are 1e-5 to 1e-4",
    "ebft": "Guo et al. 2024, arXiv 2402.12419, github.com/sunggo/EBFT, 76ded25; 256 x 1,024 tokens; here without its betas "
    "(0.9 and 0.95) and its gradient clipping (norm 1)",
    "3basil-tm": "arXiv 2603.01376, github.com/mazumder-lab/3BASiL, 5ce1037; 128 x 2,048 tokens; the published code makes masks "
    "with another ADMM, and its learning rate falls to a fifth along a cosine",
    "alps": "Meng et al. 2024, arXiv 2406.07831; 128 x 2,048 tokens; prunes only; here with this library's ADMM, of fewer rounds",
    "sparsegpt": "Frantar & Alistarh 2023, arXiv 2301.00774; 128 x 2,048 tokens; prunes only",
    "wanda": "Sun et al. 2023, arXiv 2306.11695; 128 x 2,048 tokens; prunes only",
    "wanda++": "Yang et al. 2025, arXiv 2503.04992; 128 x 2,048 tokens; only its regional gradients, not its "
    "regional optimisation (five rounds of both, with RMSprop at 3e-7 on the block's output, one pass each over 32 samples)",
}
STEPS = 32  # the fewest by default: with fewer, a model can get worse, as AdamW's first steps follow the noise of single samples


FromZero = Annotated[int, "a whole number from 0", lambda value: value >= 0]
FromOne = Annotated[int, "a whole number from 1", lambda value: value >= 1]
Size = Annotated[float, "a number from 0", lambda value: value >= 0]
Positive = Annotated[float, "a number above 0", lambda value: value > 0]
Share = Annotated[float, "a number from 0 to 1", lambda value: 0 <= value <= 1]
PositiveShare = Annotated[float, "a number above 0 to 1", lambda value: 0 < value <= 1]
Names = tuple[str, ...]


class Checked:
    """Base of the configs: raises `ReconError` for a value that an option does not allow, and stores others in one form."""

    def __post_init__(self):
        for each in fields(self):
            value = getattr(self, each.name)
            kind, *bounds = get_args(each.type) if get_origin(each.type) is Annotated else (each.type,)
            if kind in (int, float):
                allowed, within = bounds
                number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)  # numpy's, too
                fits = number and math.isfinite(value) and within(value)
                stored = kind(value) if fits else value
            elif get_origin(kind) is Literal:
                stored, fits, allowed = value, value in get_args(kind), ", ".join(get_args(kind))
            elif kind == Names:
                stored = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
                fits, allowed = isinstance(stored, tuple) and all(isinstance(one, str) for one in stored), "a list of names"
            else:
                stored, fits = value, isinstance(value, kind)
                allowed = {bool: "True, False", str: "text", str | None: "text, None"}.get(kind, str(kind))
            if not fits:
                raise ReconError(f"{each.name} is {value!r}; allowed: {allowed}")
            object.__setattr__(self, each.name, stored)


def epochs_for(samples: int, per_step: int) -> int:
    """The default number of passes over `samples` samples: one, or as many as make `STEPS` steps of `per_step` samples."""
    return max(1, -(-STEPS // -(-samples // per_step)))


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Which model."""

    model: str = "smollm2-135m"  # A bundled name (see `recon models`), a local folder, a GGUF file, or a Hub id.
    revision: str | None = None  # Branch, tag or commit of a Hub id; default: the commit in the Hub's cache, or else the newest.
    trust_remote_code: bool = False  # Run the code that comes with a model, for types that transformers does not know.
    pruned: str | None = None  # A model that something else pruned from `model`: its zeros are the mask; no criterion is used.
    pruned_revision: str | None = None  # Branch, tag or commit of the pruned model, if it is a Hub id.


@dataclass(frozen=True)
class CalibrationConfig(Checked):
    """The text that pruning and reconstruction read."""

    text: str = "wikipedia"  # Calibration text: wikipedia, news, code, c4, wikitext2, or a .txt, .jsonl or .parquet file.
    samples: FromOne = 64  # Calibration samples that windows are reconstructed with.
    sequence_length: FromZero = 0  # Tokens per calibration sample; 0: 512, or fewer where the model was made for fewer.
    held_out_samples: FromZero = 8  # Validation samples for errors; a window that gets worse on the first two is rolled back.


@dataclass(frozen=True)
class PruningConfig(Checked):
    """Which weights are pruned."""

    criterion: str = "wanda"  # Rule that decides which weights are pruned; `recon criteria` lists them all.
    pattern: str = "0.5"  # Sparsity such as 0.5, or N:M such as 2:4 (N kept of every M).
    # Where weights compete (N:M: always in groups of M). auto: in a matrix if weighting is fisher, else as the criterion says.
    scope: Literal[("auto", *SCOPES)] = "auto"
    # Activations that the criterion sees: the dense model's (dense; always for FLAP), or the pruned one's (sparse, as published).
    statistics: Literal["sparse", "dense"] = "dense"
    # How sparse each block is. uniform: all the same. dlp: by the median of weight times input norm. measured: by how much the
    # predictions change if Wanda prunes this block alone. The sparsity of all blocks together does not change.
    allocation: Literal["uniform", "dlp", "measured"] = "uniform"
    # How rows of a matrix compete. none: all alike. fisher: weighted by how much the dense model's predictions depend on each.
    weighting: Literal["none", "fisher"] = "none"
    reorder_neurons: bool = False  # Reorder MLP neurons first, so that N:M keeps larger scores; the dense outputs stay the same.
    prune_samples: FromZero = 0  # Calibration samples that the criterion sees; 0: as many as reconstruction.
    mask_refinement: FromZero = 0  # Maximum exchanges per row of a pruned and a kept weight, always of the best pair.
    sparsegpt_block_size: FromZero = 128  # Columns that SparseGPT prunes at once; 0: as many as samples (the paper's code).
    sparsegpt_damping: PositiveShare = 0.01  # Added to SparseGPT's Hessian, as a share of its mean diagonal.

    def __post_init__(self):
        object.__setattr__(self, "pattern", str(Pattern.parse(str(self.pattern))))
        super().__post_init__()
        if self.criterion not in CRITERIA:  # not a `Literal`: users can add criteria
            raise ReconError(f"criterion is {self.criterion!r}; allowed: {', '.join(CRITERIA)}")
        structured = CRITERIA[self.criterion].structured
        suited = [name for name, each in CRITERIA.items() if each.scores and each.statistics in ("none", "norm")]
        unsuited, groups, uneven = self.criterion not in suited, ":" in self.pattern, self.allocation != "uniform"
        whole, weighted = structured or self.criterion == "none", self.weighting != "none"
        for name, refused, beside, allowed in (
            ("mask_refinement", self.mask_refinement and unsuited, "criterion", f"0, or with {', '.join(suited)}"),
            ("pattern", structured and groups, "criterion", "the share of the weights that is to go, such as 0.2"),
            ("scope", structured and self.scope != "auto", "criterion", "auto"),
            ("allocation", uneven and whole, "criterion", "uniform"),
            ("allocation", uneven and groups, "pattern", "uniform, or a sparsity such as 0.5"),
            ("weighting", weighted and whole, "criterion", "none"),
            ("weighting", weighted and groups, "pattern", "none, or a sparsity such as 0.5"),
            ("weighting", weighted and self.scope == "row", "scope", "none, or scope matrix, in which rows compete"),
            ("reorder_neurons", self.reorder_neurons and not groups, "pattern", "False, or N:M"),
        ):
            if refused:
                value, given = getattr(self, name), getattr(self, beside)
                raise ReconError(f"{name} is {value!r} with {beside} {given!r}; allowed: {allowed}")

    @property
    def gathers(self) -> str:
        """The statistics of the matrices' inputs that pruning gathers; see `recon.kernels.criteria.Criterion`."""
        return "gram" if self.mask_refinement else CRITERIA[self.criterion].statistics

    @property
    def reads(self) -> bool:
        """Whether pruning reads calibration samples."""
        return self.gathers != "none" or self.allocation != "uniform" or self.weighting != "none" or self.reorder_neurons

    def on(self, samples: int) -> "PruningConfig":
        """These options, with `samples` in place of a `sparsegpt_block_size` of 0. Raises `ReconError` for too few samples."""
        if self.allocation == "measured" and samples == 1:
            raise ReconError("allocation is 'measured' with 1 calibration sample; it needs at least 2, to leave one out")
        return self if self.sparsegpt_block_size else replace(self, sparsegpt_block_size=samples)


@dataclass(frozen=True)
class ReconstructionConfig(Checked):
    """How windows are fitted."""

    granularity: str = "half-block"  # Size of windows: none (prune only), matrix, half-block, block, <k>-blocks, quarter, model.
    # Inputs and targets of a window. dense: both are the dense model's activations. sparse: inputs from
    # the already reconstructed model, targets the dense window's outputs on those same inputs. mixed: inputs from the already
    # reconstructed model, targets the dense model's own activations.
    propagation: Literal["dense", "sparse", "mixed"] = "mixed"
    solver: Literal["adamw", "exact"] = "adamw"  # Gradient descent, or masked least squares (granularity matrix only).
    start: Literal["pruned", "exact"] = "pruned"  # Start from the pruned weights, or from the exact solution of every matrix.
    exact_iterations: FromOne = 15  # Maximum number of conjugate-gradient iterations for exact solutions.
    train: Literal["matrices", "all"] = "matrices"  # Parameters to train: matrices with their biases, or all, norms included.
    adapter: Literal[("none", *ADAPTERS)] = "none"  # Low-rank parametrisation of a window's matrices.
    rank: FromOne = 16  # Rank of adapters.
    # Squared error of each channel over its variance (whitened) or of all channels together (mse, the paper's), or 1 - cosine.
    loss: Literal[tuple(LOSSES)] = "whitened"
    # Weight of each sample's first position, whose activations are massive, in gradient descent. scaled: it counts no more than
    # the others. skipped: it is left out. full: it is not scaled, as in exact solutions.
    first_position: Literal[POSITIONS] = "scaled"
    learning_rate: Positive = 0.01  # Peak rate of AdamW for half-blocks; for other windows see --size-power, --matrix-rate.
    size_power: Size = 0.65  # The learning rate of a window of n half-blocks is divided by n to this power.
    matrix_rate: Positive = 0.1  # Learning rate of single matrices, as a share of the rate for half-blocks.
    rate: Literal[RATES] = "relative"  # Relative: times the root mean square of each matrix's kept weights; absolute: as given.
    epochs: FromZero = 0  # Passes over the calibration samples, per window; 0: one, or as many as make 32 steps.
    batch_size: FromOne = 1  # Samples per forward pass.
    chunks: FromOne = 4  # Maximum chunks per sample, for windows that do not mix tokens (MLP halves, matrices).
    accumulation: FromOne = 1  # Forward passes per optimiser step.
    warmup: Share = 0.1  # Share of the steps in which the learning rate rises.
    weight_decay: Size = 0.0  # Decoupled weight decay of AdamW: each step shrinks a parameter by this times its learning rate.
    roll_back: bool = True  # Whether a window that gets worse on held-out samples is rolled back to its pruned weights.

    def __post_init__(self):
        object.__setattr__(self, "granularity", canonical(str(self.granularity)))
        super().__post_init__()
        if self.solver == "exact" and self.granularity not in ("matrix", "none"):
            raise ReconError(f"solver exact is for granularity matrix, not {self.granularity!r}; larger windows have start exact")
        if self.solver == "exact" and self.loss not in ("whitened", "mse"):  # both have the same solution
            raise ReconError(f"solver exact minimises squared errors, not loss {self.loss!r}; allowed: whitened, mse")
        if self.adapter != "none" and (self.solver == "exact" or self.train == "all"):
            raise ReconError(f"adapter {self.adapter!r} is all that is trained; it goes with solver adamw and train matrices")

    def schedule(self, samples: int, window: Window | None = None) -> Schedule:
        """The schedule for this many samples: of `window`, or by default of a half-block; see `guides/deviations.md`."""
        pace = 1.0 if window is None else self.matrix_rate if window.matrices else window.halves**-self.size_power
        epochs = self.epochs or epochs_for(samples, self.batch_size * self.accumulation)
        return Schedule(
            self.learning_rate * pace, self.rate, epochs, self.batch_size, self.accumulation, self.warmup, self.weight_decay
        )

    def chunks_of(self, window: Window, length: int) -> int:
        """How many equal chunks a sample of `length` tokens is cut into for `window`: a divisor of `length` and of `chunks`."""
        return 1 if window.mixes_tokens else math.gcd(self.chunks, length)


def two_passes(pruning: PruningConfig, reconstruction: ReconstructionConfig, samples: int) -> str:
    """Why windows cannot be pruned one by one as reconstruction on `samples` samples reaches them; empty if they can."""
    gathers, exact = pruning.gathers, "exact" in (reconstruction.solver, reconstruction.start)
    other = pruning.reads and pruning.prune_samples not in (0, samples)
    reasons = {
        f"criterion {pruning.criterion!r} weighs heads and neurons of the whole model": CRITERIA[pruning.criterion].structured,
        f"criterion {pruning.criterion!r} weighs gradients of the output of blocks": gathers == "gradient",
        f"criterion {pruning.criterion!r} weighs moments, and exact solutions take Gram matrices": gathers == "moments" and exact,
        "sparse propagation computes no activations of the dense model": reconstruction.propagation == "sparse",
        "statistics are from the pruned model (statistics sparse)": gathers != "none" and pruning.statistics == "sparse",
        f"pruning reads other samples ({pruning.prune_samples}) than reconstruction ({samples})": other,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


@dataclass(frozen=True)
class RetrainingConfig(Checked):
    """Retraining of the whole model."""

    retrain: Literal[("none", "full", *ADAPTERS, "norms")] = "none"
    """What is retrained: none; full, every parameter with the embeddings; low-rank adapters of all matrices; norms and biases."""
    retrain_objective: Literal["labels", "distil"] = "labels"
    """Cross-entropy of the next token (labels), or KL divergence from the dense model (distil; Hinton et al. 2015)."""
    retrain_samples: FromZero = 0  # Calibration samples for retraining; 0: as many as reconstruction.
    retrain_rank: FromOne = 16  # Rank of adapters in retraining.
    retrain_learning_rate: Positive = 1e-3  # Peak learning rate of retraining.
    retrain_rate: Literal[RATES] = "relative"  # Whether the learning rate of retraining is relative or absolute, as for windows.
    retrain_epochs: FromZero = 0  # Passes over the samples of retraining; 0: one, or as many as make 32 steps.
    retrain_batch_size: FromOne = 1  # Samples per forward pass in retraining.
    retrain_accumulation: FromOne = 1  # Forward passes per optimiser step in retraining.
    retrain_warmup: Share = 0.1  # Share of the steps of retraining in which the learning rate rises.
    retrain_checkpointing: bool = False  # Recompute blocks in the backward pass: less memory, a third more time.

    def schedule(self, samples: int) -> Schedule:
        """The schedule for this many samples."""
        batch, accumulation = self.retrain_batch_size, self.retrain_accumulation
        epochs = self.retrain_epochs or epochs_for(samples, batch * accumulation)
        return Schedule(self.retrain_learning_rate, self.retrain_rate, epochs, batch, accumulation, self.retrain_warmup)


@dataclass(frozen=True)
class EvaluationConfig(Checked):
    """What is measured, on which text."""

    evaluation_texts: Names = ("wikipedia",)  # Texts whose evaluation split perplexity is measured on; the first is the headline.
    evaluation_samples: FromOne = 48  # Text windows per evaluation text.
    evaluation_more_samples: FromZero = 0  # Text windows of each further text; 0: as many as of the first.
    evaluation_length: FromZero = 0  # Tokens per text window; 0: 256, or fewer where the model was made for fewer.
    kl_windows: FromZero = 4  # Text windows of each text, from the first, to measure KL divergence from the dense model on.
    evaluation_protocol: Literal[tuple(PROTOCOLS)] = "samples"
    """How text windows begin. samples: each as the tokenizer begins a text. joined: only the first, as in published values."""
    # Tasks: analogies, last_word (bundled); boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa (Hub).
    tasks: Names = ()
    task_limit: FromZero = 200  # Questions per zero-shot task, at most; 0: all.

    def __post_init__(self):
        super().__post_init__()
        if not self.evaluation_texts:
            raise ReconError("evaluation_texts is empty; name at least one text")
        if len(set(self.evaluation_texts)) < len(self.evaluation_texts):
            raise ReconError(f"evaluation_texts {self.evaluation_texts} names a text twice; name each once")

    @property
    def windows(self) -> dict[str, int]:
        """How many text windows of each text are predicted."""
        more = self.evaluation_more_samples or self.evaluation_samples
        return {text: more if number else self.evaluation_samples for number, text in enumerate(self.evaluation_texts)}


@dataclass(frozen=True)
class ComputeConfig(Checked):
    """Where and in what precision."""

    device: str = "auto"  # Where to compute: auto (cuda if there is one, else cpu), cpu, cuda, ...
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # Precision of matrix products; auto: bfloat16 if native.
