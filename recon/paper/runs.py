"""Run records as comparisons see them: what a run did, under which protocol, and which runs stand for a method.

Only runs of one protocol are compared.
"""

import math
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np

from recon.errors import ReconError
from recon.kernels.gradient_descent import Schedule
from recon.study.record import RunRecord
from recon.study.spec import RunSpec, place

DEFAULTS = RunSpec().flat()
# A method is what pruning, reconstruction and retraining are asked for. Of its options, those of schedules are its tuning (but for
# the number of epochs, and whether rates are relative), all others its setting.
_TUNABLE = {field.name for field in fields(Schedule)} - {"epochs", "rate"} | {"chunks"}
_RATES = {"learning_rate", "retrain_learning_rate"}
# Judged one by one, of the protocol, or without influence.
_APART = {"model", "revision", "pattern", "samples", "statistics", "checkpointing"}
# What models are measured by, on evaluation text: the negative log-likelihood of the first text, that of the second, and the divergence
# from the dense model on the first.
MEASURES = {"own": "perplexity", "other": "perplexity on another text", "kl": "KL to dense"}
_METHOD = {name: place(name)[1] for name in DEFAULTS if place(name)[0] in ("model", "pruning", "reconstruction", "retraining")}
_TUNING = [name for name, field in _METHOD.items() if field in _TUNABLE]
_SETTING = [name for name, field in _METHOD.items() if field not in _TUNABLE | _APART]


def _idle(name: str, spec: dict) -> bool:
    """Whether the option `name` changes nothing in a run of `spec`."""
    return (
        (place(name)[0] == "reconstruction" and name != "granularity" and spec["granularity"] == "none")
        or (place(name)[0] == "retraining" and spec["retrain"] == "none")
        or (name.startswith("exact_") and "exact" not in (spec["solver"], spec["start"]))
        or (name.startswith("sparsegpt_") and spec["criterion"] != "sparsegpt")
    )


# A seed, and the precision of products, which machines differ in: runs of one seed are pairs only where it is the same.
Seed = tuple[int, str]


def once(seeds: Iterable[Seed]) -> list[Seed]:
    """Sorted; a seed that was run in several precisions counts once, in the first of them: its runs are hardly independent."""
    return sorted({seed: (seed, precision) for seed, precision in sorted(seeds, reverse=True)}.values())


class Run:
    """A finished record. Raises `ReconError` for one that has nothing to judge by."""

    def __init__(self, record: RunRecord):
        spec = DEFAULTS | record.spec
        spec = {name: DEFAULTS[name] if _idle(name, spec) else spec[name] for name in DEFAULTS}
        dtype = record.environment.get("compute_dtype", "")
        self.record, self.key, self.pattern = record, record.key, spec["pattern"]
        self.seed: Seed = (spec["seed"], dtype)
        self.model = spec["model"] + (f"@{spec['revision']}" if spec["revision"] else "")
        self.samples = spec["samples"]
        self.trained_samples = (spec["retrain_samples"] if spec["retrain"] != "none" else 0) or spec["samples"]
        self.setting = {name: spec[name] for name in _SETTING}
        self.tuning = tuple((name, spec[name]) for name in _TUNING)
        self.evaluated = spec["evaluation_texts"][0]
        self.nll = self._read_nll(self.evaluated)
        # By measure and state (dense, pruned, reconstructed), nats of each window, (windows,); without those that the record lacks.
        self.measures = {"own": self.nll}
        if len(spec["evaluation_texts"]) > 1:
            self.measures["other"] = self._read_nll(spec["evaluation_texts"][1])
        if kl := record.metrics["by_text"][self.evaluated].get("kl_per_window"):
            self.measures["kl"] = {"dense": np.zeros(len(kl["pruned"]))} | {state: np.array(kl[state], float) for state in kl}
        tokens = record.protocol.get("token_hashes", {}).get(f"evaluation {self.evaluated}", "")
        self.windows = (tokens, self.nll["dense"].size)
        self.protocol = (
            spec["text"], spec["sequence_length"], spec["prune_samples"] or spec["samples"], spec["statistics"], self.evaluated,
            spec["evaluation_samples"], spec["evaluation_length"], spec["evaluation_protocol"],
        )  # fmt: skip

    def _read_nll(self, text: str) -> dict[str, np.ndarray]:
        """Negative log-likelihoods (windows,) of the dense, the pruned and the final model on `text`."""
        try:
            found = self.record.metrics["by_text"][text]["nll_per_window"]
            nll = {state: np.array(found[state], float) for state in ("dense", "pruned", "reconstructed")}
        except (KeyError, TypeError, ValueError) as error:
            raise ReconError(f"record {self.key}: no nll_per_window of {text!r} to judge by: {error!r}") from error
        shapes = {values.shape for values in nll.values()}
        if len(shapes) > 1 or nll["dense"].ndim != 1 or not nll["dense"].size:
            raise ReconError(f"record {self.key}: nll_per_window has shapes {sorted(shapes)}; they must agree")
        return nll

    def cost(self, kind: str) -> float:
        """Samples trained on last, or the flops of all training; NaN where the record does not say."""
        if kind == "samples":
            return self.trained_samples
        return sum(self.record.flops.get(phase) or 0.0 for phase in ("reconstruct", "retrain")) or math.nan


def pick(runs: Iterable[Run], options: dict, tuned: bool = False) -> dict[Seed, Run]:
    """By seed, the runs whose setting differs from the defaults by `options` alone, all of one tuning.

    Options that are tuning hold for it. Of several tunings the one nearest the defaults, so that no side of a comparison is tuned more than the other. `tuned`: every side
    had its learning rates searched. Then the rates with the lowest held-out perplexity (mean over the seeds that all tunings have) are
    taken, all other tuning again nearest the defaults. Evaluation text never decides.
    """
    wanted = {name: {**DEFAULTS, **options}[name] for name in _SETTING}
    pinned = {(name, value) for name, value in options.items() if name in _TUNING}
    choices: dict[tuple, dict[Seed, Run]] = {}
    for run in runs:
        if run.setting == wanted and pinned <= set(run.tuning):
            choices.setdefault(run.tuning, {}).setdefault(run.seed, run)
    if not choices:
        return {}

    def but_rates(tuning: tuple) -> tuple:
        return tuple((name, value) for name, value in tuning if name not in _RATES)

    if tuned:
        plainest = min(map(but_rates, choices), key=_distance)
        choices = {tuning: found for tuning, found in choices.items() if but_rates(tuning) == plainest}
        shared = set.intersection(*(set(found) for found in choices.values()))
        held_out = {
            tuning: [found[seed].record.metrics.get("held_out_perplexity") for seed in shared]
            for tuning, found in choices.items()
        }
        if shared and all(value is not None for values in held_out.values() for value in values):
            # A run that diverged has no finite perplexity, and is not chosen.
            return choices[min(choices, key=lambda t: (np.nan_to_num(np.mean(held_out[t]), nan=math.inf), *_distance(t)))]
    return choices[min(choices, key=_distance)]


def _distance(tuning: tuple) -> tuple:
    """How far a tuning is from the defaults, option by option; the tuning itself decides ties."""
    # 0 counts as 1e-12: a warm-up of 0 is further from the default than any positive one, and so is any weight decay from none.
    return *(abs(math.log(max(value, 1e-12) / max(DEFAULTS[name], 1e-12))) for name, value in tuning), repr(tuning)


def protocol(run: Run, kind: str) -> tuple:
    """What runs have to share to enter a comparison of this kind."""
    shared = run.protocol
    if kind not in ("ratio", "combined", "samples"):
        shared += (run.samples,)
    if kind != "trend":  # tokenizers differ between models, and so do windows
        shared += run.windows
    return shared


def check_windows(runs: list[Run]) -> None:
    """Raises `ReconError` if the dense model's negative log-likelihoods differ where windows and model are said to be the same."""
    first: dict[tuple, Run] = {}
    for run in runs:
        known = first.setdefault((run.model, run.protocol, run.windows), run)
        # Kernels of other machines differ by far less than this, other windows by far more.
        if not np.allclose(known.nll["dense"], run.nll["dense"], rtol=0, atol=0.02, equal_nan=True):
            raise ReconError(
                f"records {known.key} and {run.key} state the same model and protocol, but the dense model's negative "
                "log-likelihoods differ: they were not evaluated on the same windows; keep them in folders of their own"
            )


def protocol_words(runs: list[Run]) -> str:
    """What the runs that were compared read and were evaluated on, in words."""
    text, length, pruned_on, statistics, evaluated, windows, evaluation_length, cut = runs[0].protocol
    dtypes = " or ".join(sorted({dtype for _, dtype in (run.seed for run in runs)} - {""}))
    counts = sorted({count for run in runs for count in (run.samples, run.trained_samples)})
    samples = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    whole = {dict(run.tuning)["chunks"] for run in runs if run.setting["granularity"] != "none"} == {1}
    return (
        f"{samples} x {length} tokens of {short(text)}{', whole samples' * whole}, pruned on {pruned_on} ({statistics} statistics); perplexity on {windows} x {evaluation_length} tokens of "
        f"{short(evaluated)}"
        + f" ({cut})" * (cut != DEFAULTS["evaluation_protocol"])
        + (f", {dtypes} products" if dtypes else "")
    )


def short(name: str) -> str:
    """The name of a model or text; of a path on this machine its last part."""
    return Path(name).name if Path(name).is_absolute() else name
