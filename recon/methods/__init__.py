"""The passes over a model: prune, reconstruct, retrain."""
