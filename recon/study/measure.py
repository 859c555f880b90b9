"""The texts of a run, the measurements of its models, and what its record says about both."""

import hashlib
import math
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from torch import Tensor

from recon.config import PROTOCOLS, EvaluationConfig
from recon.data import models
from recon.data.text import sample_tokens
from recon.evaluate import perplexity as evaluation
from recon.evaluate import zero_shot
from recon.methods.samples import ERROR_SAMPLES
from recon.model.decoder import Decoder
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator
from recon.study.spec import RunSpec


@dataclass(frozen=True)
class Texts:
    """The tokens that a run reads, each (samples, length)."""

    calibration: Tensor  # one random draw; each phase reads the first samples of it
    held_out: Tensor | None  # from the validation split, to measure errors on; None if there are none
    evaluation: dict[str, Tensor]  # by name of the text

    @classmethod
    def draw(cls, spec: RunSpec, tokenizer) -> "Texts":
        """The texts of `spec`. Raises `ReconError` for a text that is unknown, cannot be read, or is too short."""
        text, length, held_out = spec.calibration.text, spec.calibration.sequence_length, spec.calibration.held_out_samples
        seed, how = generator(spec.seed, "calibration").initial_seed() % 2**32, spec.evaluation
        most = max(spec.calibration.samples, *spec.samples_by_phase.values())
        return cls(
            sample_tokens(text, "calibration", tokenizer, most, length, seed),
            sample_tokens(text, "validation", tokenizer, held_out, length) if held_out else None,
            {
                name: sample_tokens(name, "evaluation", tokenizer, count, how.evaluation_length, protocol=how.evaluation_protocol)
                for name, count in how.windows.items()
            },
        )

    def hashes(self) -> dict[str, str]:
        """Hashes of the tokens, by name: runs on the same tokens have the same hashes."""
        read = {"calibration": self.calibration, **{f"evaluation {name}": tokens for name, tokens in self.evaluation.items()}}
        return {name: digest(tokens) for name, tokens in read.items()}


def digest(tokens: Tensor) -> str:
    """Hash of `tokens`."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def measure(
    decoder: Decoder, name: str, texts: Texts, config: EvaluationConfig, tokenizer, execution: Execution, dense: tuple = ()
) -> tuple[dict, dict[str, Tensor]]:
    """Measures the model of `decoder`; gives the results (plain data) and, of the dense model, states to compare others with.

    name: of the model, for progress bars. dense: the dense model and its states; empty if `decoder` is the dense model.

    Returns "perplexities": by text, the fields of `Perplexity`; "zero_shot": as `recon.evaluate.zero_shot.zero_shot` gives it;
    "held_out": perplexity on held-out samples, or None; "drift": after each block, the unexplained share of the variance of the
    dense residual stream, empty for the dense model. Then the dense model's last states, by number of the text: (windows, length,
    hidden), of the windows on which KL divergence is measured.
    """
    decoder.check_causal()
    perplexities, kept, drift, last, held_out = {}, {}, [], None, None
    for number, (text, tokens) in enumerate(texts.evaluation.items()):
        other = (dense[0], dense[1][str(number)]) if dense else None
        said = f"perplexity ({name}, {text})"
        states = evaluation.last_states(decoder, tokens, execution, said)
        found = evaluation.perplexity(decoder, tokens, execution=execution, reference=other, states=states, description=said)
        perplexities[text] = asdict(found)
        if not dense:
            first = states[: config.kl_windows]
            kept[str(number)] = execution.empty(first.shape, first.dtype, first.device).copy_(first)  # the other states are freed
        del states
    if texts.held_out is not None:
        if dense:
            drift, last = evaluation.drift(decoder, dense[0], texts.held_out, execution=execution)
        said = f"perplexity ({name}, held out)"
        held_out = evaluation.perplexity(decoder, texts.held_out, execution=execution, states=last, description=said).value
    limit = config.task_limit or None
    tasks = zero_shot.zero_shot(decoder, tokenizer, config.tasks, limit, execution=execution) if config.tasks else {}
    return {"perplexities": perplexities, "zero_shot": tasks, "drift": drift, "held_out": held_out}, kept


def count_zeros(decoder: Decoder) -> dict:
    """The share of zeros in all matrices of `decoder` together ("sparsity"), and in each ("sparsity_by_matrix")."""
    counts = {}
    for block in decoder.windows("block"):
        with decoder.loaded(block):
            for name, matrix in decoder.matrices(block).items():
                counts[name] = int(matrix.weight.count_nonzero()), matrix.weight.numel()
    kept, size = (sum(numbers) for numbers in zip(*counts.values()))
    return {"sparsity": (size - kept) / size, "sparsity_by_matrix": {name: 1 - own / of for name, (own, of) in counts.items()}}


def metrics(spec: RunSpec, dense: dict, pruned: dict, final: dict) -> dict:
    """The metrics of a record, from results of `measure`: of the first text, held-out samples and tasks; "by_text": of all."""
    states, by_text = {"dense": dense, "pruned": pruned, "reconstructed": final}, {}
    for text in spec.evaluation.evaluation_texts:
        found = {state: measured["perplexities"][text] for state, measured in states.items()}
        values, divergences = [each["value"] for each in found.values()], found["reconstructed"]["kl_per_window"]
        by_text[text] = {
            **dict(zip(("dense_perplexity", "pruned_perplexity", "perplexity"), values)),
            "share_recovered": share_recovered(*values),
            "nll_per_window": {state: each["per_window"] for state, each in found.items()},
            "kl_per_window": {state: found[state]["kl_per_window"] for state in ("pruned", "reconstructed")},
            "kl": sum(divergences) / len(divergences) if divergences else None,
        }
    headline = by_text[spec.evaluation.evaluation_texts[0]]
    found = {name: value for name, value in headline.items() if not isinstance(value, dict)}
    found |= {"dense_held_out_perplexity": dense["held_out"], "held_out_perplexity": final["held_out"]}
    if spec.evaluation.tasks:
        found["zero_shot"] = {state: measured["zero_shot"] for state, measured in states.items()}
        for prefix, measured in (("dense_", dense), ("pruned_", pruned), ("", final)):
            found[f"{prefix}accuracy"] = fmean(task["acc"] for task in measured["zero_shot"]["tasks"].values())
    for suffix, measured in (("_pruned", pruned), ("", final)):
        found[f"held_out_error{suffix}"] = measured["drift"][-1] if measured["drift"] else None
        found[f"drift{suffix}"] = measured["drift"]
    return found | {"by_text": by_text}


def share_recovered(dense: float, pruned: float, final: float) -> float | None:
    """1 - log(final / dense) / log(pruned / dense), in perplexities; None if pruning did no harm, or a perplexity is infinite."""
    if not (math.isfinite(pruned) and math.isfinite(final) and pruned > dense):
        return None
    return 1 - math.log(final / dense) / math.log(pruned / dense)


def tokens(spec: RunSpec, texts: Texts, dense: dict) -> dict[str, int]:
    """How many tokens each phase reads; for evaluation, how many are predicted."""
    read = {phase: count * spec.calibration.sequence_length for phase, count in spec.samples_by_phase.items()}
    held_out = 0 if texts.held_out is None else texts.held_out.numel()
    return read | {"held_out": held_out, "evaluation": sum(result["tokens"] for result in dense["perplexities"].values())}


def protocol(spec: RunSpec, texts: Texts, dense: Decoder, dtype: torch.dtype) -> dict:
    """How the numbers were measured, in words; "dense": what the dense model's weights were dequantised from, or their dtype."""
    calibration, how, model = spec.calibration, spec.evaluation, spec.model
    read = f"{calibration.sequence_length} tokens of {calibration.text}"
    windows = ", ".join(f"{count} consecutive windows of {text}" for text, count in how.windows.items())
    samples = ", ".join(f"{phase} {count}" for phase, count in spec.samples_by_phase.items())
    asked = f"the first {how.task_limit or 'all'} questions of each; scored by lm-eval, float32 logits"
    said = {"dense": models.precision(models.configuration(*spec.loaded_by))}
    if model.pruned is not None:
        pruned = models.configuration(model.pruned, model.pruned_revision, model.trust_remote_code)
        said["pruned"] = models.precision(pruned)
    if dense.reading:
        said["reading"] = dense.reading
    return said | {
        "calibration": f"{samples} x {read} (calibration split), seed {spec.seed}",
        "evaluation": "perplexity: exp of the mean negative log-likelihood over all but the first token of each window; "
        f"{windows} x {how.evaluation_length} tokens (evaluation split), every window on its own; "
        f"{PROTOCOLS[how.evaluation_protocol]}; {str(dtype).removeprefix('torch.')} products, float32 loss",
        "kl": f"KL(dense || model) per token, on up to {how.kl_windows} evaluation windows of each text, the first ones",
        "flops": "counted by torch on shapes, as if the run shared nothing",
        "drift": "share of the variance of the dense residual stream after each block that is unexplained, mean over channels "
        f"and over all tokens but the first of each sample, on {calibration.held_out_samples} x {read} (validation split)",
        "held_out_error": "drift after the last block",
        "rolled_back": "a window is rolled back where the unexplained share of its own target grew on the first "
        f"{min(ERROR_SAMPLES, calibration.held_out_samples)} of these samples"
        if spec.reconstruction.roll_back and calibration.held_out_samples
        else "a window is rolled back only where a value is not finite",
        "zero_shot": f"{', '.join(how.tasks)}: {asked}" if how.tasks else "none",
        "share_recovered": "1 - log(reconstructed / dense) / log(pruned / dense), in perplexities",
        "token_hashes": texts.hashes(),
    }
