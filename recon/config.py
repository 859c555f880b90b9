"""Every option, one config per concern. `recon.study.spec.RunSpec` is made of them, and so is the command line."""

import math
from dataclasses import dataclass, fields, replace

from recon.errors import ReconError
from recon.kernels.adapters import ADAPTERS
from recon.kernels.criteria import CRITERIA, Structured
from recon.kernels.criteria import get as get_criterion
from recon.kernels.gradient_descent import RATES, Schedule
from recon.kernels.losses import LOSSES
from recon.kernels.patterns import SCOPES, Pattern
from recon.model.windows import Window, canonical
from recon.options import Options, option

PROPAGATIONS = {
    "dense": "inputs from the dense model, targets the dense window's outputs",
    "sparse": "inputs from the already reconstructed model, targets the dense window's outputs on those same inputs",
    "mixed": "inputs from the already reconstructed model, targets the dense model's own activations",
}
STATISTICS = {
    "sparse": "from the already pruned model, as the authors of Wanda and SparseGPT do",
    "dense": "from the dense model",
}
SOLVERS = {
    "adamw": "gradient descent (AdamW, linear schedule with warm-up)",
    "exact": "masked least squares, matrix by matrix (granularity matrix only)",
}
STARTS = {
    "pruned": "the weights that pruning left",
    "exact": "the masked least-squares solution of every matrix in the window",
}
TRAINED = {
    "matrices": "the matrices of the window, with their biases",
    "all": "every parameter that the window's output depends on, norms included",
}
RETRAINING = {
    "none": "no retraining",
    "full": "every parameter, embeddings included; the mask is applied after every step",
    **ADAPTERS,
    "norms": "biases and norms only (Zimmer et al. 2023, arXiv 2312.15230)",
}
OBJECTIVES = {
    "labels": "cross-entropy of the next token",
    "distil": "KL divergence from the dense model's predictions (Hinton et al. 2015, arXiv 1503.02531)",
}
# Where a length is 0, it is so many tokens, or as many as the model was made for where these are fewer.
LENGTHS = {"sequence_length": 512, "evaluation_length": 1024}
PROTOCOLS = {
    "samples": "every text window begins as the tokenizer begins a text",
    "joined": "the text is tokenised at once and cut, so only the first window begins as a text does (published perplexities)",
}
# Recipes: options by flat name. fast, default and best differ in the time they take on the same samples. `paper` is the published one,
# as its code has it (github.com/ZIB-IOL/Free-Lunch-in-LLM-Compression, 601ea9e): its learning rates are 1e-5 to 1e-4, and SparseGPT prunes
# as many columns at once as there are samples.
PRESETS: dict[str, dict] = {
    "fast": {"propagation": "dense", "batch_size": 2},
    "default": {},
    "best": {"start": "exact", "exact_iterations": 4, "epochs": 2},
    "paper": {
        "statistics": "sparse", "sparsegpt_block_size": 0,
        "propagation": "dense", "loss": "mse", "skip_first": False, "train": "all", "rate": "absolute", "learning_rate": 1e-4,
        "size_power": 0.0, "matrix_rate": 1.0, "epochs": 1, "batch_size": 2, "chunks": 1, "roll_back": False,
    },
}  # fmt: skip
STEPS = 32  # with fewer, a model can get worse than it was: AdamW's first steps follow the noise of single samples


def schedule_of(config: "ReconstructionConfig | RetrainingConfig", samples: int) -> Schedule:
    """The schedule that `config` asks for: its options of the same names, and a number of epochs for this many samples."""
    asked = Schedule(**{each.name: getattr(config, each.name) for each in fields(Schedule) if hasattr(config, each.name)})
    return replace(asked, epochs=asked.epochs or max(1, -(-STEPS // -(-samples // asked.per_step))))


@dataclass(frozen=True)
class ModelConfig(Options):
    """Which model."""

    model: str = option("smollm2-135m", "A bundled name (see `recon models`), a local folder, a GGUF file, or a Hub id.")
    revision: str | None = option(
        None, "Branch, tag or commit of a Hub id; default: the commit in the Hub's cache, or else the newest."
    )
    trust_remote_code: bool = option(False, "Run the code that comes with a model, for types that transformers does not know.")
    pruned: str | None = option(
        None, "A model that something else pruned, from `model`: its mask is read from its zeros, and no criterion is used."
    )
    pruned_revision: str | None = option(None, "Branch, tag or commit of the pruned model, where it is a Hub id.")


@dataclass(frozen=True)
class CalibrationConfig(Options):
    """The text that pruning and reconstruction read."""

    text: str = option("wikipedia", "Calibration text: wikipedia, news, code, c4, wikitext2, or a .txt, .jsonl or .parquet file.")
    samples: int = option(64, "Calibration samples that windows are reconstructed with.", least=1)
    sequence_length: int = option(
        0,
        f"Tokens per calibration sample; 0: {LENGTHS['sequence_length']}, or fewer where the model was made for fewer.",
        least=0,
    )
    held_out_samples: int = option(
        8,
        "Samples of the validation split to measure errors on; a window that gets worse on the first two is rolled back.",
        least=0,
    )


@dataclass(frozen=True)
class PruningConfig(Options):
    """Which weights go.

    Raises `ReconError` for an unknown name, a malformed pattern, and combinations that have no meaning.
    """

    criterion: str = option("wanda", "What decides which weights go (see `recon criteria`).", choices=CRITERIA)
    pattern: str = option("0.5", "Sparsity such as 0.5, or N:M such as 2:4 (N kept of every M).")
    scope: str = option(
        "auto", "Weights compete within a row or the matrix; auto is the criterion's own default.", choices=("auto", *SCOPES)
    )
    statistics: str = option("dense", "Statistics from the dense model, or from the already pruned one.", choices=STATISTICS)
    samples: int = option(
        0, "Calibration samples that the criterion sees; 0: as many as reconstruction.", least=0, flag="prune_samples"
    )
    mask_refinement: int = option(
        0, "Exchanges of a pruned and a kept weight tried in each row after the criterion has chosen.", least=0
    )
    sparsegpt_block_size: int = option(
        128, "Columns that SparseGPT prunes at once; 0: as many as there are calibration samples (the paper's code).", least=0
    )
    sparsegpt_damping: float = option(0.01, "Added to SparseGPT's Hessian, as a share of its mean diagonal.", above=0, most=1)
    compensate: bool = option(True, "Whether FLAP adds the mean of what it removes to a bias.")

    def __post_init__(self):
        object.__setattr__(self, "pattern", str(Pattern.parse(str(self.pattern))))
        super().__post_init__()
        criterion, pattern = get_criterion(self.criterion), Pattern.parse(self.pattern)
        structured = isinstance(criterion, Structured)
        if self.mask_refinement and not criterion.scores:
            suited = ", ".join(name for name, each in CRITERIA.items() if each.scores)
            does = "removes whole heads and neurons" if structured else "adapts weights to its own mask"
            raise ReconError(
                f"mask_refinement is {self.mask_refinement}, but criterion {self.criterion!r} {does}; criteria that it suits: {suited}"
            )
        if structured and pattern.m is not None:
            raise ReconError(
                f"pattern is {pattern}, but criterion {self.criterion!r} removes whole heads and neurons; "
                "give the share of the weights that is to go, such as 0.2"
            )
        if structured and self.scope != "auto":
            raise ReconError(
                f"scope is {self.scope!r}, but criterion {self.criterion!r} compares whole heads and neurons within a "
                f"{criterion.scope}; allowed: auto"
            )

    def on(self, samples: int) -> "PruningConfig":
        """These options for so many calibration samples."""
        return self if self.sparsegpt_block_size else replace(self, sparsegpt_block_size=samples)


@dataclass(frozen=True)
class ReconstructionConfig(Options):
    """How windows are fitted.

    Raises `ReconError` for an unknown name, a number out of bounds, and combinations that have no meaning.
    """

    preset: str = option(
        "default",
        "Recipe: fast, default, best, or paper (as published). It sets other options that are at their defaults.",
        choices=PRESETS,
    )
    granularity: str = option("half-block", "Window: none (prune only), matrix, half-block, block, <k>-blocks, quarter, model.")
    propagation: str = option("mixed", "What feeds a window and what it must match: dense, sparse, mixed.", choices=PROPAGATIONS)
    solver: str = option("adamw", "How a window is fitted: adamw, or exact (granularity matrix).", choices=SOLVERS)
    start: str = option("pruned", "Where fitting starts: pruned weights, or exact matrix solutions.", choices=STARTS)
    exact_iterations: int = option(15, "Iterations of conjugate gradients for exact solutions, at most.", least=1)
    train: str = option(
        "matrices", "What is trained in a window: its matrices with their biases, or all of its parameters.", choices=TRAINED
    )
    adapter: str = option(
        "none", "Low-rank parametrisation of a window's matrices: none, lora, masklora, scalelora.", choices=("none", *ADAPTERS)
    )
    rank: int = option(16, "Rank of adapters.", least=1)
    loss: str = option(
        "whitened",
        "Squared error of each channel relative to its variance (whitened), of all channels together (mse, the paper's), of each token "
        "relative to its target (relative), or one minus the cosine (cosine).",
        choices=LOSSES,
    )
    skip_first: bool = option(
        True, "Whether the loss leaves out each sample's first position, whose activations are massive whatever the text."
    )
    learning_rate: float = option(
        0.01, "Peak learning rate of AdamW for half-blocks; for other windows see size_power and matrix_rate.", above=0
    )
    # 0.75 was chosen at absolute rates. At relative ones it suits 4 blocks of SmolLM2 and is too slow for all (50 %, seed 0, held-out
    # perplexity at this rate and three times it: 50.6 and 53.9; 54.2 and 50.6).
    size_power: float = option(0.75, "The learning rate of a window of n half-blocks is divided by n to this power.", least=0)
    # They begin near their optimum, and at the rate of half-blocks most end worse than pruned (SmolLM2 at 50 %, seed 0, held-out
    # perplexity at 1, 0.3 and 0.1 of that rate: 73, 60.3 and 58.8; in a later run at 0.1 and 0.03: 58.7 and 61.2; pruned 63.5).
    matrix_rate: float = option(0.1, "Learning rate of single matrices as a share of that of half-blocks.", above=0)
    rate: str = option(
        "relative",
        "Whether the learning rate is times the root mean square of the surviving weights of each matrix (relative), or not (absolute).",
        choices=RATES,
    )
    epochs: int = option(
        0, f"Passes over the calibration samples, per window; 0: one, or as many as make {STEPS} steps.", least=0
    )
    batch_size: int = option(1, "Samples per forward pass.", least=1)
    chunks: int = option(
        4,
        "Chunks, at most, that samples are cut into where a window does not mix tokens (MLP halves, matrices): more steps, same work.",
        least=1,
    )
    accumulation: int = option(1, "Forward passes per optimiser step.", least=1)
    warmup: float = option(0.1, "Share of the steps in which the learning rate rises.", least=0, most=1)
    weight_decay: float = option(
        0.0, "Decoupled weight decay of AdamW: each step shrinks the weights by this times the learning rate.", least=0
    )
    roll_back: bool = option(True, "Whether a window that gets worse on held-out samples goes back to its pruned weights.")

    def __post_init__(self):
        object.__setattr__(self, "granularity", canonical(str(self.granularity)))
        super().__post_init__()
        for each in fields(self):
            if each.name in PRESETS[self.preset] and getattr(self, each.name) == each.default:
                object.__setattr__(self, each.name, PRESETS[self.preset][each.name])
        object.__setattr__(self, "preset", "default")  # a record says what it stood for
        if self.solver == "exact" and self.granularity not in ("matrix", "none"):
            raise ReconError(
                f"solver exact fits single matrices, not granularity {self.granularity!r}; use granularity matrix, or start exact "
                "to begin larger windows from the exact solution of their matrices"
            )
        if self.solver == "exact" and self.loss not in ("whitened", "mse"):  # the same for each output channel
            raise ReconError(f"solver exact minimises squared errors, not loss {self.loss!r}; allowed: whitened, mse")
        if self.adapter != "none" and (self.solver == "exact" or self.train == "all"):
            raise ReconError(f"adapter {self.adapter!r} is all that is trained; it goes with solver adamw and train matrices")

    def schedule(self, samples: int) -> Schedule:
        """How this many samples are trained on."""
        return schedule_of(self, samples)

    def pace(self, window: Window) -> float:
        """The learning rate of `window` as a share of that of a half-block."""
        return self.matrix_rate if window.matrices else window.halves**-self.size_power

    def chunks_of(self, window: Window, length: int) -> int:
        """How many chunks of one length samples of `length` tokens are cut into for `window`: the greatest divisor of both numbers."""
        return 1 if window.mixes_tokens else math.gcd(self.chunks, length)


def two_passes(pruning: PruningConfig, reconstruction: ReconstructionConfig, samples: int) -> str:
    """Why windows cannot be pruned one by one as reconstruction reaches them; empty where they can.

    samples: that reconstruction reads.
    """
    criterion = get_criterion(pruning.criterion)
    reads = criterion.statistics != "none" or pruning.mask_refinement > 0
    if isinstance(criterion, Structured):
        return f"criterion {pruning.criterion!r} weighs heads and neurons of the whole model against one another"
    if reconstruction.propagation == "sparse":
        return "under sparse propagation, the dense model's activations are not computed"
    if reads and pruning.statistics == "sparse":
        return "statistics are from the pruned model (statistics sparse)"
    if reads and pruning.samples not in (0, samples):
        return f"pruning reads other samples ({pruning.samples}) than reconstruction ({samples})"
    return ""


@dataclass(frozen=True)
class RetrainingConfig(Options):
    """Retraining of the whole model."""

    method: str = option(
        "none", "Retraining of the whole model: none, full, lora, masklora, scalelora, norms.", choices=RETRAINING, flag="retrain"
    )
    objective: str = option(
        "labels",
        "What retraining learns from: labels (the next tokens), or distil (the dense model's predictions).",
        choices=OBJECTIVES,
        flag="retrain_objective",
    )
    samples: int = option(0, "Calibration samples for retraining; 0: as many as reconstruction.", least=0, flag="retrain_samples")
    rank: int = option(16, "Rank of adapters in retraining.", least=1, flag="retrain_rank")
    learning_rate: float = option(1e-3, "Peak learning rate of retraining.", above=0, flag="retrain_learning_rate")
    rate: str = option(
        "relative",
        "Whether the learning rate of retraining is relative or absolute, as for windows.",
        choices=RATES,
        flag="retrain_rate",
    )
    epochs: int = option(
        0, f"Passes over the samples of retraining; 0: one, or as many as make {STEPS} steps.", least=0, flag="retrain_epochs"
    )
    batch_size: int = option(1, "Samples per forward pass in retraining.", least=1, flag="retrain_batch_size")
    accumulation: int = option(1, "Forward passes per optimiser step in retraining.", least=1, flag="retrain_accumulation")
    warmup: float = option(
        0.1, "Share of the steps of retraining in which the learning rate rises.", least=0, most=1, flag="retrain_warmup"
    )
    checkpointing: bool = option(
        False, "Keeps the blocks' inputs alone and runs each block again in the backward pass: less memory, a third more time.",
        flag="retrain_checkpointing",
    )  # fmt: skip

    def schedule(self, samples: int) -> Schedule:
        """How this many samples are trained on."""
        return schedule_of(self, samples)


@dataclass(frozen=True)
class EvaluationConfig(Options):
    """What is measured, on which text."""

    texts: tuple[str, ...] = option(
        ("wikipedia",),
        "Texts whose evaluation split perplexity is measured on; the first is the headline.",
        flag="evaluation_texts",
    )
    samples: int = option(40, "Text windows per evaluation text.", least=1, flag="evaluation_samples")
    more_samples: int = option(
        0, "Text windows of each text but the first; 0: as many as of the first.", least=0, flag="evaluation_more_samples"
    )
    length: int = option(
        0,
        f"Tokens per text window; 0: {LENGTHS['evaluation_length']}, or fewer where the model was made for fewer.",
        least=0,
        flag="evaluation_length",
    )
    kl_windows: int = option(4, "The first text windows of each text, on which KL to the dense model is measured.", least=0)
    protocol: str = option(
        "samples",
        "How text windows begin: samples, each as the tokenizer begins a text; joined, only the first, as for published perplexities.",
        choices=PROTOCOLS,
        flag="evaluation_protocol",
    )
    tasks: tuple[str, ...] = option(
        (),
        "Zero-shot tasks: analogies, last_word (bundled); boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa (Hub).",
    )
    task_limit: int = option(200, "Questions per zero-shot task, at most; 0: all.", least=0)

    def __post_init__(self):
        super().__post_init__()
        if not self.texts:
            raise ReconError("evaluation_texts is empty; name at least one text")

    @property
    def windows(self) -> dict[str, int]:
        """How many text windows of each text are predicted."""
        return {text: (number and self.more_samples) or self.samples for number, text in enumerate(self.texts)}


@dataclass(frozen=True)
class ComputeConfig(Options):
    """Where and in what precision."""

    device: str = option("auto", "Where to compute: auto (cuda if there is one, else cpu), cpu, cuda, ...")
    compute_dtype: str = option(
        "auto", "Matrix products in bfloat16 or float32; auto takes bfloat16 where the hardware multiplies it natively.",
        choices=("auto", "bfloat16", "float32"),
    )  # fmt: skip
