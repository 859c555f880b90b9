"""What a run is asked for, and what it answers: `RunSpec` and `RunRecord`."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields

from recon.data import models, text
from recon.errors import ReconError
from recon.kernels import criteria
from recon.kernels.criteria import Structured
from recon.kernels.gradient_descent import Schedule
from recon.kernels.least_squares import Exact
from recon.kernels.patterns import SCOPES, Pattern
from recon.methods import prune as pruning
from recon.methods import reconstruct as reconstruction
from recon.methods import retrain as retraining
from recon.model.windows import canonical
from recon.runtime import device

GIVEN = "given"  # criterion and pattern of a run whose mask comes from elsewhere
_MASK_OPTIONS = (
    "criterion", "pattern", "scope", "prune_propagation", "prune_samples", "sparsegpt_block_size", "sparsegpt_damping", "swaps",
)  # fmt: skip
SCHEMA = 3  # goes into every key: raised when the meaning of a record's numbers changes, or a default of `RunSpec`


@dataclass(frozen=True)
class RunSpec:
    """Everything that can change a run's numbers."""

    model: str = "smollm2-135m"
    """A bundled name (see `recon models`), a local folder, a GGUF file, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; without it, the commit that is in the Hub's cache already, or else the newest."""
    pruned: str | None = None
    """A model that something else pruned, from `model`: its mask is read from its zeros, and criterion and pattern are "given"."""
    pruned_revision: str | None = None
    """Branch, tag or commit of the pruned model, where it is a Hub id."""
    trust_remote_code: bool = False
    """Run the code that comes with a model, for types of models that transformers does not know."""
    text: str = "wikipedia"
    """Calibration text: wikipedia, news, code, c4, wikitext2, or a .txt, .jsonl or .parquet file."""
    samples: int = 64
    """Calibration samples that windows are repaired with."""
    prune_samples: int = 0
    """Calibration samples that the criterion sees; 0: as many as windows are repaired with."""
    sequence_length: int = 512
    """Tokens per calibration sample."""
    criterion: str = "wanda"
    """What decides which weights go (see `recon criteria`)."""
    pattern: str = "0.5"
    """Sparsity such as 0.5, or N:M such as 2:4 (N kept of every M)."""
    scope: str = "auto"
    """Weights compete within a row or the matrix; auto is the criterion's own default."""
    prune_propagation: str = "sparse"
    """Statistics from the already pruned model (sparse) or from the dense one (dense)."""
    sparsegpt_block_size: int = 128
    """Columns that SparseGPT prunes at once."""
    sparsegpt_damping: float = 0.01
    """Added to SparseGPT's Hessian, as a share of its mean diagonal."""
    swaps: int = 0
    """Exchanges of a pruned and a kept weight tried in each row after the criterion has chosen (magnitude, Wanda, ...)."""
    granularity: str = "half-block"
    """Window: none (prune only), matrix, half-block, block, <k>-blocks, quarter, model."""
    propagation: str = "dense"
    """What feeds a window and what it must match: dense, sparse, mixed."""
    solver: str = "adamw"
    """How a window is fitted: adamw, or exact (granularity matrix)."""
    start: str = "pruned"
    """Where fitting starts: pruned weights, or exact matrix solutions."""
    exact_samples: int = 0
    """Samples that exact solutions are computed from, rounded up to whole batches of 1,024 tokens; 0: all."""
    exact_iterations: int = 15
    """Iterations of conjugate gradients for exact solutions, at most."""
    train: str = "matrices"
    """What is trained in a window: its matrices with their biases, or all of its parameters, norms included."""
    adapter: str = "none"
    """Low-rank parametrisation of a window's matrices: none, lora, masklora, scalelora."""
    rank: int = 16
    """Rank of adapters, in windows and in retraining."""
    loss: str = "mse"
    """mse, cosine, or relative (squared error relative to each token's target)."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW; a window of n half-blocks is trained with it over n^0.75."""
    epochs: int = 1
    """Passes over the calibration samples, per window."""
    batch_size: int = 1
    """Samples per forward pass."""
    pieces: int = 1
    """Pieces that samples are cut into where a window does not mix tokens (MLP halves, matrices): more steps, same work."""
    accumulation: int = 1
    """Forward passes per optimiser step."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    then: str = "none"
    """Retraining of the whole model afterwards: none, full, lora, masklora, scalelora, norms (biases and norms)."""
    objective: str = "labels"
    """What retraining learns from: labels (the next token), or distil (the dense model's predictions)."""
    then_samples: int = 0
    """Calibration samples for retraining; 0: as many as windows are repaired with."""
    then_learning_rate: float = 3e-4
    """Peak learning rate of retraining."""
    then_epochs: int = 1
    """Passes of retraining over its samples."""
    then_batch_size: int = 1
    """Samples per forward pass in retraining."""
    then_accumulation: int = 1
    """Forward passes per optimiser step in retraining."""
    then_checkpointing: bool = False
    """Retraining keeps the blocks' inputs alone and runs each block again in the backward pass: less memory, a third more time."""
    held_out_samples: int = 8
    """Samples of the text's validation split to measure errors on; a window that gets worse on the first two is put back."""
    evaluation_texts: tuple[str, ...] = ("wikipedia",)
    """Texts whose evaluation split perplexity is measured on; the first is the headline."""
    evaluation_samples: int = 40
    """Windows per evaluation text."""
    evaluation_length: int = 1024
    """Tokens per evaluation window."""
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks: analogies, last_word (bundled); boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa (Hub)."""
    task_limit: int = 200
    """Questions per zero-shot task, at most; 0: all."""
    seed: int = 0
    """Seed of every random choice."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    compute_dtype: str = "auto"
    """Matrix products in bfloat16 or float32; auto takes bfloat16 where the hardware multiplies it natively."""

    def __post_init__(self):
        object.__setattr__(self, "granularity", canonical(str(self.granularity)))
        if self.pruned is None:
            object.__setattr__(self, "pattern", str(Pattern.parse(str(self.pattern))))
        else:
            self._take_mask_as_given()
        for name in ("evaluation_texts", "tasks"):
            value = getattr(self, name)
            if not isinstance(value, str | list | tuple):
                raise ReconError(f"{name} is {value!r}; allowed: a list of names")
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        reconstruction.check_options(
            self.granularity,
            self.propagation,
            self.solver,
            self.start,
            self.loss,
            self.train,
            self.adapter,
            self.rank,
        )
        retraining.check_options("full" if self.then == "none" else self.then, self.objective)
        for name in ("then_checkpointing", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise ReconError(f"{name} is {getattr(self, name)!r}; allowed: True, False")
        for name, allowed in (
            ("scope", ("auto", *SCOPES)),
            ("prune_propagation", ("sparse", "dense")),
            ("compute_dtype", ("auto", *device.COMPUTE_DTYPES)),
        ):
            if getattr(self, name) not in allowed:
                raise ReconError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        minima = dict.fromkeys(
            (
                "samples",
                "epochs",
                "batch_size",
                "accumulation",
                "evaluation_samples",
                "sparsegpt_block_size",
                "pieces",
                "exact_iterations",
                "rank",
                "then_epochs",
                "then_batch_size",
                "then_accumulation",
            ),
            1,
        )
        minima |= {"sequence_length": 2, "evaluation_length": 2}
        minima |= dict.fromkeys(
            ("held_out_samples", "seed", "exact_samples", "swaps", "prune_samples", "then_samples", "task_limit"), 0
        )
        for name, least in minima.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ReconError(f"{name} is {value!r}; allowed: a whole number from {least} up")
        if self.pruned is None:
            pruning.check_options(self.criterion, Pattern.parse(self.pattern), self.scope, self.swaps)
        for name in ("learning_rate", "then_learning_rate"):
            if not (_is_number(getattr(self, name)) and 0 < getattr(self, name) < math.inf):
                raise ReconError(f"{name} is {getattr(self, name)!r}; allowed: a number above 0")
        for name in ("warmup", "sparsegpt_damping"):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise ReconError(f"{name} is {getattr(self, name)!r}; allowed: a number from 0 to 1")
        for name in ("learning_rate", "then_learning_rate", "warmup", "sparsegpt_damping"):
            object.__setattr__(self, name, float(getattr(self, name)))  # 1 and 1.0 are one value, and have one key
        if self.sequence_length % self.pieces:
            raise ReconError(f"pieces is {self.pieces}; allowed: a number that divides sequence_length, {self.sequence_length}")
        if not self.evaluation_texts:
            raise ReconError("evaluation_texts is empty; name at least one text")

    def _take_mask_as_given(self) -> None:
        """Marks as given what decides about the mask; refuses what would have decided about it."""
        defaults = {f.name: f.default for f in fields(self)}
        for name in _MASK_OPTIONS:
            if getattr(self, name) not in (defaults[name], GIVEN):
                raise ReconError(
                    f"{name} is {getattr(self, name)!r}, but the mask is read from the pruned model {self.pruned!r}; leave it out"
                )
        for name in ("criterion", "pattern"):
            object.__setattr__(self, name, GIVEN)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.learning_rate, self.epochs, self.batch_size, self.accumulation, self.warmup, self.pieces)

    @property
    def then_schedule(self) -> Schedule:
        return Schedule(self.then_learning_rate, self.then_epochs, self.then_batch_size, self.then_accumulation, self.warmup)

    @property
    def samples_by_phase(self) -> dict[str, int]:
        """Calibration samples that each phase reads: the first so many of one random draw."""
        return {
            "prune": 0 if self.pruned else self.prune_samples or self.samples,
            "reconstruct": self.samples,
            "retrain": self.then_samples or self.samples,
        }

    @property
    def loaded_by(self) -> tuple:
        """What decides the dense model: its name, its revision, and whether code that comes with it is run."""
        return self.model, self.revision, self.trust_remote_code

    @property
    def pruned_by(self) -> tuple:
        """What decides the pruned state that the run repairs; runs that agree on it can share that state."""
        if self.pruned is not None:
            return (*self.loaded_by, self.pruned, self.pruned_revision)
        names = "seed text sequence_length criterion pattern scope prune_propagation sparsegpt_block_size sparsegpt_damping swaps"
        return (*self.loaded_by, *(getattr(self, name) for name in names.split()), self.samples_by_phase["prune"])

    @property
    def changes_weights(self) -> bool:
        """Whether pruning may leave other weights than those of the dense model; a run in memory then keeps these as well."""
        if self.pruned is not None:
            return True
        rule = criteria.get(self.criterion)
        return not (isinstance(rule, Structured) or rule.scores or self.criterion == "none")

    @property
    def exact(self) -> Exact:
        return Exact(self.exact_samples, self.exact_iterations)

    def sources(self) -> dict:
        """Hashes of the files that the run reads, and the schema of its record."""
        found = {
            "schema": SCHEMA,
            "model": models.fingerprint(*self.loaded_by),
            "texts": {name: text.fingerprint(name) for name in sorted({self.text, *self.evaluation_texts})},
        }
        if self.pruned is not None:
            found["pruned"] = models.fingerprint(self.pruned, self.pruned_revision, self.trust_remote_code)
        return found

    def decisive(self) -> dict:
        """The fields, the same for specs that say the same in different ways."""
        spec = asdict(self)
        for name in ("prune_samples", "then_samples"):
            if spec[name] == self.samples:  # as many samples, said in another way
                spec[name] = 0
        return spec

    def key(self) -> str:
        """Hash of everything that can change the run's numbers: this spec, the files it reads, and the record schema.

        Fields at their defaults are left out, so that a new option does not disown old records.
        """
        defaults = {f.name: f.default for f in fields(self)}
        parts = {"spec": {name: value for name, value in self.decisive().items() if value != defaults[name]}, **self.sources()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
