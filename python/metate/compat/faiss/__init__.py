"""faiss' indexes, selectors, transforms and files over metate.search, with numpy arrays or tensors.

Import it as it is, or let `metate.compat.install("faiss")` put it under the name `faiss`.
"""

from metate.compat.faiss.arrays import (
    copy_array_to_vector,
    eval_intersection,
    pairwise_distances,
    rand,
    randint,
    randn,
    swig_ptr,
    vector_float_to_array,
    vector_to_array,
)
from metate.compat.faiss.base import METRIC_INNER_PRODUCT, METRIC_L2, DistanceComputer, Index
from metate.compat.faiss.clustering import Clustering, Kmeans, kmin, knn, normalize_L2
from metate.compat.faiss.composite import IndexIDMap, IndexIDMap2, IndexPreTransform, IndexRefine, IndexRefineFlat
from metate.compat.faiss.factory import (
    IO_FLAG_MMAP,
    IO_FLAG_MMAP_IFC,
    IO_FLAG_READ_ONLY,
    IO_FLAG_SKIP_PRECOMPUTE_TABLE,
    ParameterSpace,
    PyCallbackIOReader,
    PyCallbackIOWriter,
    VectorIOReader,
    VectorIOWriter,
    clone_index,
    deserialize_index,
    downcast_index,
    extract_index_ivf,
    index_factory,
    read_index,
    read_ProductQuantizer,
    serialize_index,
    write_index,
    write_ProductQuantizer,
)
from metate.compat.faiss.indexes import IndexFlat, IndexFlatCodes, IndexFlatIP, IndexFlatL2, IndexPQ
from metate.compat.faiss.ivf import DirectMap, IndexIVF, IndexIVFFlat, IndexIVFPQ
from metate.compat.faiss.parameters import ClusteringParameters
from metate.compat.faiss.quantizer import ProductQuantizer
from metate.compat.faiss.selectors import (
    IDSelector,
    IDSelectorAll,
    IDSelectorAnd,
    IDSelectorArray,
    IDSelectorBatch,
    IDSelectorBitmap,
    IDSelectorNot,
    IDSelectorOr,
    IDSelectorRange,
    IDSelectorTranslated,
    IDSelectorXOr,
    IndexRefineSearchParameters,
    IVFSearchParameters,
    PyCallbackIDSelector,
    SearchParameters,
    SearchParametersIVF,
    SearchParametersPQ,
    SearchParametersPreTransform,
)
from metate.compat.faiss.transforms import LinearTransform, OPQMatrix, PCAMatrix, RandomRotationMatrix, VectorTransform

__version__ = "1.15.1"  # the faiss release whose interface this is


def omp_get_max_threads() -> int:
    import torch

    return torch.get_num_threads()


def omp_set_num_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


__all__ = [
    "IO_FLAG_MMAP", "IO_FLAG_MMAP_IFC", "IO_FLAG_READ_ONLY", "IO_FLAG_SKIP_PRECOMPUTE_TABLE",
    "METRIC_INNER_PRODUCT", "METRIC_L2", "Clustering", "ClusteringParameters", "DirectMap", "DistanceComputer",
    "IDSelector", "IDSelectorAll", "IDSelectorAnd", "IDSelectorArray", "IDSelectorBatch", "IDSelectorBitmap",
    "IDSelectorNot", "IDSelectorOr", "IDSelectorRange", "IDSelectorTranslated", "IDSelectorXOr",
    "IVFSearchParameters", "Index", "IndexFlat", "IndexFlatCodes", "IndexFlatIP", "IndexFlatL2", "IndexIDMap",
    "IndexIDMap2", "IndexIVF", "IndexIVFFlat", "IndexIVFPQ", "IndexPQ", "IndexPreTransform", "IndexRefine",
    "IndexRefineFlat", "IndexRefineSearchParameters", "Kmeans", "LinearTransform", "OPQMatrix", "PCAMatrix",
    "ParameterSpace", "ProductQuantizer", "PyCallbackIDSelector", "PyCallbackIOReader", "PyCallbackIOWriter",
    "RandomRotationMatrix", "SearchParameters", "SearchParametersIVF", "SearchParametersPQ",
    "SearchParametersPreTransform", "VectorIOReader", "VectorIOWriter", "VectorTransform", "clone_index",
    "copy_array_to_vector", "deserialize_index", "downcast_index", "eval_intersection", "extract_index_ivf",
    "index_factory", "kmin", "knn", "normalize_L2", "omp_get_max_threads", "omp_set_num_threads",
    "pairwise_distances", "rand", "randint", "randn", "read_ProductQuantizer", "read_index", "serialize_index",
    "swig_ptr", "vector_float_to_array", "vector_to_array", "write_ProductQuantizer", "write_index",
]  # fmt: skip
