"""What a run is asked for: `RunSpec`, made of the configs in `recon.config`; and how it is carried out: `RunOptions`."""

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path

from recon.config import (
    LENGTHS,
    PRESETS,
    CalibrationConfig,
    ComputeConfig,
    EvaluationConfig,
    ModelConfig,
    PruningConfig,
    ReconstructionConfig,
    RetrainingConfig,
    two_passes,
)
from recon.errors import ReconError
from recon.kernels import criteria
from recon.options import Options, flag, option
from recon.runtime.device import SAVED
from recon.study import workers
from recon.study.workers import Ray

SCHEMA = 6  # part of every key; raise it when the meaning of a record's values, or a default, changes


@dataclass(frozen=True)
class RunSpec(Options):
    """Everything that can change a run's numbers.

    Options have flat names as well, which the command line, records and tables use: `RunSpec.of(granularity="block", samples=16)`,
    `spec.flat()`, `spec.replaced(seed=1)`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    retraining: RetrainingConfig = field(default_factory=RetrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    seed: int = option(0, "Seed of every random choice.", least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.model.pruned is not None and self.pruning != PruningConfig():
            changed = next(f for f in fields(PruningConfig) if getattr(self.pruning, f.name) != f.default)
            raise ReconError(
                f"{flag(changed)} is {getattr(self.pruning, changed.name)!r}, but the mask is read from the pruned model "
                f"{self.model.pruned!r}; leave it out"
            )

    # --- flat names -----------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, **values) -> "RunSpec":
        """The spec with these options, by flat name. Raises `ReconError` for a name that is no option."""
        return cls().replaced(**values)

    def replaced(self, **values) -> "RunSpec":
        """This spec with other values of some options, by flat name. Raises `ReconError` for a name that is no option."""
        changed: dict[str, dict] = {}
        known = {field.name for field in fields(ReconstructionConfig)}  # which follow the preset by themselves
        for name, value in PRESETS.get(values.get("preset"), {}).items():
            if name not in known and values.get(name, options()[name].default) == options()[name].default:
                values[name] = value
        for name, value in values.items():
            concern, attribute = place(name)
            changed.setdefault(concern, {})[attribute] = value
        own = changed.pop("", {})
        return replace(self, **own, **{name: replace(getattr(self, name), **parts) for name, parts in changed.items()})

    def flat(self) -> dict:
        """The value of every option, by flat name."""
        return {name: self.get(name) for name in options()}

    def get(self, name: str) -> object:
        """The value of the option with this flat name."""
        concern, attribute = place(name)
        return getattr(getattr(self, concern) if concern else self, attribute)

    # --- what phases read -----------------------------------------------------------------------------------------

    @property
    def samples_by_phase(self) -> dict[str, int]:
        """Calibration samples that each phase reads: the first so many of one random draw."""
        samples = self.calibration.samples
        return {
            "prune": 0 if self.model.pruned else self.pruning.samples or samples,
            "reconstruct": samples,
            "retrain": self.retraining.samples or samples,
        }

    @property
    def loaded_by(self) -> tuple:
        """What decides the dense model: its name, its revision, and whether code that comes with it is run."""
        return self.model.model, self.model.revision, self.model.trust_remote_code

    @property
    def pruned_by(self) -> tuple:
        """What decides the pruned model; runs that agree on it can share it."""
        if self.model.pruned is not None:
            return (*self.loaded_by, self.model.pruned, self.model.pruned_revision)
        calibration = self.calibration
        read = calibration.text, calibration.sequence_length, self.samples_by_phase["prune"]
        return (*self.loaded_by, self.seed, *read, replace(self.pruning, samples=0))

    @property
    def changes_weights(self) -> bool:
        """Whether pruning may change weights that survive."""
        if self.model.pruned is not None:
            return True
        criterion = criteria.get(self.pruning.criterion)
        return not (isinstance(criterion, criteria.Structured) or criterion.scores or self.pruning.criterion == "none")

    @property
    def one_pass(self) -> bool:
        """Whether windows are pruned one by one as reconstruction reaches them."""
        reconstructs = self.reconstruction.granularity != "none" and self.model.pruned is None
        return reconstructs and not two_passes(self.pruning, self.reconstruction, self.calibration.samples)

    def resolved(self) -> "RunSpec":
        """This spec with a number for every length that is 0, by the model's configuration; see `recon.config.LENGTHS`.

        Where that cannot be read, the spec stays as it is: loading the model will say what is wrong.
        """
        from recon.data import models  # slow to import, as below
        from recon.model.skeleton import max_length

        asked = [name for name in LENGTHS if self.get(name) == 0]
        try:
            longest = max_length(models.configuration(*self.loaded_by)) if asked else None
        except ReconError:
            return self
        return self.replaced(**{name: min(LENGTHS[name], longest or LENGTHS[name]) for name in asked})

    # --- the key --------------------------------------------------------------------------------------------------

    def sources(self) -> dict:
        """Hashes of the files that the run reads, and the schema of its record."""
        from recon.data import models, text

        found = {
            "schema": SCHEMA,
            "model": models.fingerprint(*self.loaded_by),
            "texts": {name: text.fingerprint(name) for name in sorted({self.calibration.text, *self.evaluation.texts})},
        }
        if self.model.pruned is not None:
            found["pruned"] = models.fingerprint(self.model.pruned, self.model.pruned_revision, self.model.trust_remote_code)
        return found

    def decisive(self) -> dict:
        """The options by flat name, the same for specs that say the same in different ways."""
        spec = self.flat()
        for name in ("prune_samples", "retrain_samples"):
            if spec[name] == self.calibration.samples:
                spec[name] = 0
        return spec

    def key(self) -> str:
        """Hash of everything that can change the run's numbers: this spec, the files it reads, and the record schema.

        Options at their defaults are left out, so that a new option does not disown old records.
        """
        defaults = options()
        parts = {
            "spec": {name: value for name, value in self.resolved().decisive().items() if value != defaults[name].default},
            **self.sources(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def options() -> dict:
    """The fields of all configs by flat name, in their order."""
    return {name: each for name, (_, each) in _places().items()}


def place(name: str) -> tuple[str, str]:
    """The config ("" for the spec itself) and the field of the option with this flat name.

    Raises `ReconError` for a name that is no option.
    """
    if name not in _places():
        raise ReconError(f"unknown option {name!r}; allowed: {', '.join(_places())}")
    concern, each = _places()[name]
    return concern, each.name


@cache
def _places() -> dict:
    found = {}
    for own in fields(RunSpec):
        for each in fields(own.type) if own.name != "seed" else (own,):
            found[flag(each)] = own.name if own.name != "seed" else "", each
    return found


@dataclass(frozen=True)
class RunOptions(Options):
    """How a run is carried out, which changes no number. Raises `ReconError` for an unknown name."""

    save: Path | None = option(
        None, "New folder for the model as a Hugging Face checkpoint, with its record. A model that the very same run saved there is not computed again."
    )  # fmt: skip
    save_dtype: str = option(
        "float32", "What weights are saved in; they are measured in float32, and rounded after that.", choices=SAVED
    )
    stream: str = option(
        "auto",
        "yes leaves the model on disk and works on one window at a time; a run that was killed goes on when it is called again. "
        "auto does so where the model would not fit into memory.",
        choices=("auto", "yes", "no"),
    )
    executor: str | Ray = option(
        "serial",
        "ray reconstructs windows side by side, on the cores and GPUs of this machine or of a cluster (dense propagation).",
    )
    force: bool = option(False, "Run even what is planned not to fit here (see `recon plan`).")
    progress: bool = option(True, "Draw progress bars.")
    command: str = option("", "The command that asked for the run, for the model card.")

    def __post_init__(self):
        object.__setattr__(self, "save", None if self.save is None else Path(self.save))
        super().__post_init__()
        if self.save_dtype != "float32" and self.save is None:
            raise ReconError(f"save_dtype is {self.save_dtype!r}, but no folder to save to is named; name one, or leave it out")
        workers.get(self.executor)
