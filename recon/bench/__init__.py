"""`recon bench`: time and memory, measured beside a straightforward loop and the machine's own ceiling."""
