"""What `metate demo` shows on real input: a decoder that learns to write Python, alone and as a mixture of experts, and
a search over docstrings."""
