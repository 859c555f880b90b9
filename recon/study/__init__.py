"""One run from its configuration to its record; studies, plans."""
