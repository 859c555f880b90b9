"""Prune a causal language model and reconstruct it, window by window.

Companion of *A Free Lunch in LLM Compression: Revisiting Retraining after Pruning* (arXiv 2510.14444).
"""

import importlib

# Public name -> module that holds it; imported on first use, so that `import recon` does not wait for torch.
_PUBLIC = {
    "CalibrationConfig": "config",
    "Callback": "methods.callbacks",
    "ComputeConfig": "config",
    "Decoder": "model.decoder",
    "EvaluationConfig": "config",
    "Execution": "runtime.execution",
    "ModelConfig": "config",
    "PruningConfig": "config",
    "Ray": "experiment.workers",
    "ReconError": "errors",
    "ReconstructionConfig": "config",
    "RetrainingConfig": "config",
    "RunOptions": "experiment.config",
    "RunSpec": "experiment.config",
    "Session": "experiment.session",
    "grid": "experiment.study",
    "load": "data.models",
    "load_masks": "methods.masks",
    "perplexity": "evaluate.perplexity",
    "prune": "methods.prune",
    "reconstruct": "methods.reconstruct",
    "retrain": "methods.retrain",
    "run": "experiment.run",
    "run_study": "experiment.study",
    "sample_tokens": "data.text",
    "save_masks": "methods.masks",
    "take_apart": "model.discovery",
}
__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'recon' has no attribute {name!r}")
    return getattr(importlib.import_module(f"recon.{_PUBLIC[name]}"), name)
