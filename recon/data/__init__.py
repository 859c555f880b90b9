"""What is read: bundled models and texts, the Hub, GGUF files, checkpoints."""
