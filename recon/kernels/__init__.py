"""The paper on tensors: criteria, patterns, least squares, losses, adapters."""
