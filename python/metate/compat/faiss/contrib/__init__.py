"""Of faiss' contributed modules, what users of the named classes import."""
