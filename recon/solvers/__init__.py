"""How one window is fitted: solvers are pure functions on tensors."""
