"""A causal LM as embedding, blocks and head, found by structure."""
