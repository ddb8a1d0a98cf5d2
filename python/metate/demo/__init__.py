"""What `metate demo` shows on real input: a decoder that learns to write Python, and a search over docstrings."""
