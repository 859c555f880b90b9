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
    "Ray": "study.cluster",
    "ReconError": "errors",
    "ReconstructionConfig": "config",
    "RetrainingConfig": "config",
    "RunOptions": "study.spec",
    "RunSpec": "study.spec",
    "Session": "study.session",
    "grid": "study.studies",
    "load": "data.models",
    "load_masks": "methods.masks",
    "perplexity": "evaluate.perplexity",
    "prune": "methods.prune",
    "reconstruct": "methods.reconstruct",
    "retrain": "methods.retrain",
    "run": "study.run",
    "run_study": "study.studies",
    "sample_tokens": "data.text",
    "save_masks": "methods.masks",
    "decompose": "model.discovery",
}
__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'recon' has no attribute {name!r}")
    return getattr(importlib.import_module(f"recon.{_PUBLIC[name]}"), name)
