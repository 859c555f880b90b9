"""Prune a causal language model and repair it by local reconstruction.

Companion of *A Free Lunch in LLM Compression: Revisiting Retraining after Pruning* (arXiv 2510.14444).
"""

import importlib

# Public name -> module that holds it; imported on first use, so that `recon --help` does not wait for torch.
_PUBLIC = {
    "Decoder": "model.decoder",
    "Ray": "experiment.cluster",
    "ReconError": "errors",
    "RunSpec": "experiment.config",
    "Schedule": "kernels.gradient_descent",
    "Session": "experiment.run",
    "grid": "experiment.study",
    "load": "data.models",
    "perplexity": "evaluate.perplexity",
    "prune": "methods.prune",
    "reconstruct": "methods.reconstruct",
    "retrain": "methods.retrain",
    "run": "experiment.run",
    "run_study": "experiment.study",
    "sample_tokens": "data.text",
    "take_apart": "model.discovery",
}
__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'recon' has no attribute {name!r}")
    return getattr(importlib.import_module(f"recon.{_PUBLIC[name]}"), name)
