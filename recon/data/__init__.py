"""Bundled assets, texts, the Hub, GGUF, checkpoints."""
