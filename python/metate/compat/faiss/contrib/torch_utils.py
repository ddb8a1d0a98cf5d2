"""Nothing to do: indexes take tensors as they are. (faiss' own module teaches its indexes to.)"""
