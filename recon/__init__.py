"""Prune a causal language model and reconstruct it, window by window.

Companion of *A Free Lunch in LLM Compression: Revisiting Retraining after Pruning* (arXiv 2510.14444).
"""

import importlib

# Public names by the module that holds them, imported on first use, so that `import recon` does not wait for torch.
_MODULES = {
    "config": (
        "CalibrationConfig ComputeConfig EvaluationConfig ModelConfig PruningConfig ReconstructionConfig RetrainingConfig"
    ),
    "data.models": "load",
    "data.text": "sample_tokens",
    "errors": "ReconError",
    "evaluate.perplexity": "perplexity",
    "methods.masks": "load_masks save_masks",
    "methods.prune": "prune",
    "methods.reconstruct": "reconstruct",
    "methods.retrain": "retrain",
    "methods.training": "Callback",
    "model.decoder": "Decoder",
    "model.discovery": "decompose",
    "runtime.execution": "Execution",
    "runtime.packed": "pack unpack",
    "study.cluster": "Ray",
    "study.run": "Session run",
    "study.shrink": "shrink",
    "study.spec": "RunOptions RunSpec",
    "study.studies": "grid run_study",
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'recon' has no attribute {name!r}")
    return getattr(importlib.import_module(f"recon.{_PUBLIC[name]}"), name)
