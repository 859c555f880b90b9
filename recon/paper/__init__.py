"""Claims, statistics, tables, figures, notebooks, the benchmark."""
