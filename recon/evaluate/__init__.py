"""Perplexity, divergence and drift from the dense model, zero-shot accuracy."""
