"""The operators: one file or folder a family."""
