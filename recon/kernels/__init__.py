"""The paper on tensors: pure functions without models or files. Matrices are (out, in); masks are True where a weight is kept."""
