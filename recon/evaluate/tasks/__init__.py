"""Bundled zero-shot tasks: their lm-eval definitions, and the code that makes their documents."""
