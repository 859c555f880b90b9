"""A causal LM, or encoder-decoder, as embedding, blocks and head, found by structure."""
