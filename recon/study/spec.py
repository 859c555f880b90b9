"""`RunSpec`: what a run computes, made of the configs in `recon.config`. `RunOptions`: how the run is carried out."""

import hashlib
import json
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from recon import config
from recon.config import Checked, FromZero
from recon.errors import ReconError
from recon.kernels import criteria
from recon.runtime.device import SAVED
from recon.study.cluster import Ray, settings

SCHEMA = 8  # part of every key; raise it when the meaning of a record's values, or a default, changes


@dataclass(frozen=True)
class RunSpec(Checked):
    """Everything that can change a run's numbers.

    Names of options are unique over all configs, so they need no prefix: `RunSpec.of(granularity="block", samples=16)`,
    `spec.flat()`, `spec.replaced(seed=1)`.
    """

    model: config.ModelConfig = field(default_factory=config.ModelConfig)
    calibration: config.CalibrationConfig = field(default_factory=config.CalibrationConfig)
    pruning: config.PruningConfig = field(default_factory=config.PruningConfig)
    reconstruction: config.ReconstructionConfig = field(default_factory=config.ReconstructionConfig)
    retraining: config.RetrainingConfig = field(default_factory=config.RetrainingConfig)
    evaluation: config.EvaluationConfig = field(default_factory=config.EvaluationConfig)
    compute: config.ComputeConfig = field(default_factory=config.ComputeConfig)
    seed: FromZero = 0  # Seed of every random choice.
    preset: Literal[tuple(config.PRESETS)] = "default"
    """Recipe, of this library or as published (see `recon presets`). It sets other options, unless they are given."""

    def __post_init__(self):
        super().__post_init__()
        changed = {name for name, value in self.flat().items() if value != _defaults()[name]}
        masked = vars(self.pruning).keys() if self.model.pruned is not None else set()
        for name in sorted(masked & changed):
            value, pruned = self.flat()[name], self.model.pruned
            raise ReconError(f"{name} is {value!r}, but the mask is read from the pruned model {pruned!r}; leave it out")
        recipe = {name: value for name, value in config.PRESETS[self.preset].items() if name not in changed | masked}
        for name, part in self._changed(recipe | {"preset": "default"}).items():  # a record has the options, not the preset
            object.__setattr__(self, name, part)

    @classmethod
    def of(cls, **values) -> "RunSpec":
        """The default spec with other values of some options; see `replaced`."""
        return cls().replaced(**values)

    def replaced(self, **values) -> "RunSpec":
        """This spec with other values of some options. A preset among them sets only options that are not given
        with it and are at their defaults in this spec; so of two presets, one after the other, the first takes precedence.

        Raises `ReconError` for a name that is no option.
        """
        first = {name: values.pop(name) for name in ("preset", "pruned") if name in values}
        base = replace(self, **self._changed(first))
        return replace(base, **base._changed(values))

    def flat(self) -> dict:
        """The value of every option."""
        parts = [vars(part) for part in vars(self).values() if is_dataclass(part)]
        return {name: value for part in (*parts, vars(self)) for name, value in part.items() if not is_dataclass(value)}

    def _changed(self, values: dict) -> dict:
        """The fields of this spec with other values of some options."""
        if unknown := values.keys() - self.flat().keys():
            raise ReconError(f"unknown option {min(unknown)!r}; allowed: {', '.join(self.flat())}")
        parts = {name: part for name, part in vars(self).items() if is_dataclass(part)}
        new = {name: replace(part, **{k: values[k] for k in vars(part).keys() & values}) for name, part in parts.items()}
        return new | {name: values[name] for name in values.keys() & {"seed", "preset"}}

    @property
    def samples_by_phase(self) -> dict[str, int]:
        """How many calibration samples each phase reads: the first ones of the same random draw."""
        samples, again = self.calibration.samples, self.retraining
        return {
            "prune": (self.pruning.prune_samples or samples) * (self.pruning.reads and self.model.pruned is None),
            "reconstruct": samples * (self.reconstruction.granularity != "none"),
            "retrain": (again.retrain_samples or samples) * (again.retrain != "none"),
        }

    @property
    def loaded_by(self) -> tuple:
        """What determines the dense model: its name, its revision, and whether code that comes with it is run."""
        return self.model.model, self.model.revision, self.model.trust_remote_code

    @property
    def pruned_by(self) -> tuple:
        """What determines the pruned model; runs for which this is equal can share the model."""
        if self.model.pruned is not None:
            return (*self.loaded_by, self.model.pruned, self.model.pruned_revision)
        read = self.calibration.text, self.calibration.sequence_length, self.samples_by_phase["prune"]
        return (*self.loaded_by, self.seed, *read, replace(self.pruning, prune_samples=0))

    @property
    def reconstructed_by(self) -> tuple:
        """What determines the reconstructed model; see `pruned_by`."""
        return self.pruned_by, self.calibration, self.reconstruction, self.compute, self.seed

    @property
    def changes_weights(self) -> bool:
        """Whether pruning may change weights that survive."""
        updates = criteria.CRITERIA[self.pruning.criterion].method is not None and self.pruning.criterion != "none"
        return self.model.pruned is not None or updates

    @property
    def one_pass(self) -> bool:
        """Whether windows are pruned one by one as reconstruction reaches them."""
        reconstructs = self.reconstruction.granularity != "none" and self.model.pruned is None
        return reconstructs and not config.two_passes(self.pruning, self.reconstruction, self.calibration.samples)

    def resolved(self) -> "RunSpec":
        """This spec with each length of 0 replaced by a number that suits the model; see `recon.config.LENGTHS`.

        If the model's configuration cannot be read, the spec stays as it is: loading the model will raise the error.
        """
        from recon.data import models  # slow to import, as below
        from recon.model.skeleton import max_length

        asked = [name for name in config.LENGTHS if self.flat()[name] == 0]
        try:
            longest = max_length(models.configuration(*self.loaded_by)) if asked else None
        except ReconError:
            return self
        return self.replaced(**{name: min(config.LENGTHS[name], longest or config.LENGTHS[name]) for name in asked})

    def sources(self) -> dict:
        """Hashes of the files that the run reads and of the code of a user's own criterion, and the schema of records."""
        from recon.data import models, text

        read = sorted({self.calibration.text, *self.evaluation.evaluation_texts})
        texts = {name: text.fingerprint(name) for name in read}
        sources = {"schema": SCHEMA, "model": models.fingerprint(*self.loaded_by), "texts": texts}
        if code := criteria.CRITERIA[self.pruning.criterion].source_code:
            sources["criterion"] = hashlib.sha256(code.encode()).hexdigest()
        if self.model.pruned is not None:
            sources["pruned"] = models.fingerprint(self.model.pruned, self.model.pruned_revision, self.model.trust_remote_code)
        return sources

    def key(self) -> str:
        """Hash of everything that can change the run's numbers: this spec, the files it reads, and the record schema.

        Options at their defaults are left out, so new options keep old keys; without reconstruction, so are all its options.
        """
        from recon.data import assets, text

        values = self.resolved().flat()
        if self.reconstruction.granularity == "none":
            values |= vars(config.ReconstructionConfig("none"))
        values |= {name: 0 for name in ("prune_samples", "retrain_samples") if values[name] == values["samples"]}  # 0 says so too
        # Files are identified by their content, not by their path.
        sources, model, named = self.sources(), self.model, {*text.TEXTS, *assets.BUNDLED_MODELS, None}
        contents = sources["texts"] | {model.model: sources["model"], model.pruned: sources.get("pruned")}
        places = {name: content for name, content in contents.items() if name not in named and Path(name).exists()}
        values |= {name: places.get(values[name], values[name]) for name in ("model", "pruned", "text")}
        values["evaluation_texts"] = tuple(places.get(name, name) for name in values["evaluation_texts"])
        sources["texts"] = {places.get(name, name): content for name, content in sources["texts"].items()}
        given = {name: value for name, value in values.items() if value != _defaults()[name]}
        return hashlib.sha256(json.dumps({"spec": given, **sources}, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _defaults() -> dict:
    """The default of every option."""
    configs = [each.default_factory for each in fields(RunSpec) if each.default is MISSING]
    return {each.name: each.default for kind in (*configs, RunSpec) for each in fields(kind) if each.default is not MISSING}


@dataclass(frozen=True)
class RunOptions(Checked):
    """How a run is carried out; none of these options changes its numbers."""

    # New folder for the model, as a Hugging Face checkpoint, and its record. If the same run is saved there, it is not repeated.
    save: Path | None = None
    save_dtype: Literal[tuple(SAVED)] = "float32"
    """Precision of the saved weights; the model is measured in float32, and rounded after that."""
    # packed stores one bit per weight and the non-zero values: at 50 % in bfloat16, little over half the size. `recon.load`
    # reads it; `recon unpack` turns it into a plain checkpoint, which other software reads.
    save_format: Literal["plain", "packed"] = "plain"
    # yes: the model stays on disk, and one window at a time is in memory; a killed run resumes when it is called again.
    # auto: yes if the model would not fit into memory.
    stream: Literal["auto", "yes", "no"] = "auto"
    executor: str | Ray = "serial"
    """ray reconstructs windows in parallel, on the cores and GPUs of this machine or of a cluster (dense propagation only)."""
    force: bool = False  # Run even if the plan says that it does not fit here (see `recon plan`).
    progress: bool = True  # Draw progress bars.
    command: str = ""  # The command that started the run, for the model card.

    def __post_init__(self):
        object.__setattr__(self, "save", None if self.save is None else Path(self.save).expanduser().resolve())
        super().__post_init__()
        for name, default in (("save_dtype", "float32"), ("save_format", "plain")):
            if (value := getattr(self, name)) != default and self.save is None:
                raise ReconError(f"{name} is {value!r}, but no folder to save to is named; name one, or leave it out")
        settings(self.executor)
