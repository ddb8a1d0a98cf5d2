"""Vector search: indexes over exact and product-quantised vectors, flat or in inverted lists, and their files."""

from metate.search.faiss_index import read_faiss, write_faiss
from metate.search.files import load
from metate.search.index import Index
from metate.search.indexes import FlatIndex, IVFFlatIndex, IVFPQIndex, PQIndex

__all__ = ["FlatIndex", "IVFFlatIndex", "IVFPQIndex", "Index", "PQIndex", "load", "read_faiss", "write_faiss"]
