"""The paper's methods: pure functions on tensors, no models or files. Matrices: (out, in); masks: True = weight is kept."""
