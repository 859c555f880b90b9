"""What the notebooks share: from run records to verdicts, figures and tables of the paper."""
