"""What a record says of a run: its metrics and its protocol."""

import math

import torch

from recon.config import PROTOCOLS
from recon.data import models
from recon.evaluate import zero_shot
from recon.methods.samples import ERROR_SAMPLES
from recon.model.decoder import Decoder
from recon.study.measure import Measured
from recon.study.spec import RunSpec
from recon.study.texts import Texts


def metrics(spec: RunSpec, dense: Measured, pruned: Measured, final: Measured) -> dict:
    """The metrics of a record: of the first text, of held-out samples and tasks, and everything by text."""
    by_text = {name: _of_text(name, dense, pruned, final) for name in spec.evaluation.evaluation_texts}
    headline = by_text[spec.evaluation.evaluation_texts[0]]
    found = {name: headline[name] for name in ("dense_perplexity", "pruned_perplexity", "perplexity", "share_recovered", "kl")}
    found |= {"dense_held_out_perplexity": dense.held_out, "held_out_perplexity": final.held_out}
    if spec.evaluation.tasks:
        found["zero_shot"] = {"dense": dense.zero_shot, "pruned": pruned.zero_shot, "reconstructed": final.zero_shot}
        for prefix, measured in (("dense_", dense), ("pruned_", pruned), ("", final)):
            found[f"{prefix}accuracy"] = zero_shot.mean_accuracy(measured.zero_shot)
    return found | {
        "held_out_error_pruned": pruned.drift[-1] if pruned.drift else None,
        "held_out_error": final.drift[-1] if final.drift else None,
        "drift_pruned": pruned.drift,
        "drift": final.drift,
        "by_text": by_text,
    }


def _of_text(name: str, dense: Measured, pruned: Measured, final: Measured) -> dict:
    results = {"dense": dense.perplexities[name], "pruned": pruned.perplexities[name], "reconstructed": final.perplexities[name]}
    values = [result.value for result in results.values()]
    divergences = results["reconstructed"].kl_per_window
    return {
        "dense_perplexity": values[0],
        "pruned_perplexity": values[1],
        "perplexity": values[2],
        "share_recovered": share_recovered(*values),
        "nll_per_window": {state: result.per_window for state, result in results.items()},
        "kl_per_window": {state: results[state].kl_per_window for state in ("pruned", "reconstructed")},
        "kl": sum(divergences) / max(1, len(divergences)),
    }


def share_recovered(dense: float, pruned: float, final: float) -> float | None:
    """1 - log(final / dense) / log(pruned / dense), in perplexities; None where pruning did no harm to recover from."""
    if not (math.isfinite(pruned) and math.isfinite(final) and pruned > dense):
        return None
    return 1 - math.log(final / dense) / math.log(pruned / dense)


def tokens(spec: RunSpec, texts: Texts, dense: Measured) -> dict[str, int]:
    """How many tokens each phase reads; of evaluation, how many are predicted."""
    read = {phase: count * spec.calibration.sequence_length for phase, count in spec.samples_by_phase.items()}
    held_out = 0 if texts.held_out is None else texts.held_out.numel()
    return read | {"held_out": held_out, "evaluation": sum(result.tokens for result in dense.perplexities.values())}


def protocol(spec: RunSpec, texts: Texts, dense: Decoder, dtype: torch.dtype) -> dict:
    """How numbers came about, in words; "dense": what the dense model's weights were dequantised from, or their dtype."""
    calibration, evaluation = spec.calibration, spec.evaluation
    read = f"{calibration.sequence_length} tokens of {calibration.text}"
    windows = ", ".join(f"{count} consecutive windows of {text}" for text, count in evaluation.windows.items())
    loaded = {"dense": spec.loaded_by}
    if spec.model.pruned is not None:
        loaded["pruned"] = (spec.model.pruned, spec.model.pruned_revision, spec.model.trust_remote_code)
    samples = ", ".join(f"{phase} {count}" for phase, count in spec.samples_by_phase.items())
    asked = f"the first {evaluation.task_limit or 'all'} questions of each; scored by lm-eval, float32 logits"
    return {
        **{name: models.precision(models.configuration(*model)) for name, model in loaded.items()},
        "calibration": f"{samples} x {read} (calibration split), seed {spec.seed}",
        "evaluation": (
            f"perplexity: exp of the mean negative log-likelihood over all but the first token of each window; {windows} x "
            f"{evaluation.evaluation_length} tokens (evaluation split), every window on its own; "
            f"{PROTOCOLS[evaluation.evaluation_protocol]}; {str(dtype).removeprefix('torch.')} products, float32 loss"
        ),
        **({"reading": dense.reading} if dense.reading else {}),
        "kl": f"KL(dense || model) per token, on the first {evaluation.kl_windows} evaluation windows",
        "flops": "closed form from the shapes, as if the run shared nothing",
        "drift": (
            "share of the variance of the dense residual stream after each block that is unexplained, mean over channels and over all "
            f"tokens but the first of each sample, on {calibration.held_out_samples} x {read} (validation split)"
        ),
        "held_out_error": "drift after the last block",
        "rolled_back": (
            f"a window is rolled back where the unexplained share of its own target grew on the first {ERROR_SAMPLES} of these samples"
        ),
        "zero_shot": f"{', '.join(evaluation.tasks)}: {asked}" if evaluation.tasks else "none",
        "share_recovered": "1 - log(reconstructed / dense) / log(pruned / dense), in perplexities",
        "token_hashes": texts.hashes(),
    }
