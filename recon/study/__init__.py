"""From options to records: one run, studies of many runs, plans, saved models."""
