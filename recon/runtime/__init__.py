"""Where tensors live while a pass runs."""
