"""faiss' indexes, selectors, transforms and files over metate.search, with numpy arrays or tensors.

Import it as it is, or let `metate.compat.install("faiss")` put it under the name `faiss`.
"""

from metate.compat.faiss.arrays import (
    ResultHeap,
    copy_array_to_vector,
    eval_intersection,
    get_mem_usage_kb,
    imbalance_factor,
    is_similarity_metric,
    merge_knn_results,
    pairwise_distances,
    swig_ptr,
    vector_float_to_array,
    vector_to_array,
)
from metate.compat.faiss.base import METRIC_INNER_PRODUCT, METRIC_L2, DistanceComputer, Index
from metate.compat.faiss.clustering import Clustering, Kmeans, kmin, knn
from metate.compat.faiss.composite import (
    IndexIDMap,
    IndexIDMap2,
    IndexPreTransform,
    IndexRefine,
    IndexRefineFlat,
    IndexShards,
)
from metate.compat.faiss.factory import (
    IO_FLAG_MMAP,
    IO_FLAG_MMAP_IFC,
    IO_FLAG_READ_ONLY,
    IO_FLAG_SKIP_PRECOMPUTE_TABLE,
    ParameterSpace,
    clone_index,
    deserialize_index,
    downcast_index,
    downcast_InvertedLists,
    downcast_Quantizer,
    downcast_VectorTransform,
    index_factory,
    read_index,
    read_ProductQuantizer,
    read_VectorTransform,
    serialize_index,
    write_index,
    write_ProductQuantizer,
    write_VectorTransform,
)
from metate.compat.faiss.indexes import (
    IndexFlat,
    IndexFlatCodes,
    IndexFlatIP,
    IndexFlatL2,
    IndexPQ,
    IndexPQFastScan,
    IndexScalarQuantizer,
)
from metate.compat.faiss.ivf import (
    DirectMap,
    IndexIVF,
    IndexIVFFlat,
    IndexIVFPQ,
    IndexIVFPQFastScan,
    IndexIVFScalarQuantizer,
)
from metate.compat.faiss.ivflib import (
    check_compatible_for_merge,
    extract_index_ivf,
    get_invlist_range,
    merge_into,
    range_search_with_parameters,
    search_and_return_centroids,
    search_centroid,
    search_with_parameters,
    set_invlist_range,
    try_extract_index_ivf,
)
from metate.compat.faiss.lists import ArrayInvertedLists, InvertedLists
from metate.compat.faiss.parameters import ClusteringParameters
from metate.compat.faiss.polysemous import PolysemousTraining
from metate.compat.faiss.quantizer import ProductQuantizer, ScalarQuantizer, normalize_L2
from metate.compat.faiss.random import rand, randint, randn
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
from metate.compat.faiss.statistics import IndexIVFStats, IndexPQStats, cvar
from metate.compat.faiss.streams import (
    BufferedIOReader,
    BufferedIOWriter,
    FileIOReader,
    FileIOWriter,
    IOReader,
    IOWriter,
    PyCallbackIOReader,
    PyCallbackIOWriter,
    VectorIOReader,
    VectorIOWriter,
    ZeroCopyIOReader,
)
from metate.compat.faiss.transforms import (
    LinearTransform,
    NormalizationTransform,
    OPQMatrix,
    PCAMatrix,
    RandomRotationMatrix,
    VectorTransform,
)

__version__ = "1.15.1"  # the faiss release whose interface this is


def omp_get_max_threads() -> int:
    import torch

    return torch.get_num_threads()


def omp_set_num_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


__all__ = [
    "IO_FLAG_MMAP", "IO_FLAG_MMAP_IFC", "IO_FLAG_READ_ONLY", "IO_FLAG_SKIP_PRECOMPUTE_TABLE",
    "METRIC_INNER_PRODUCT", "METRIC_L2", "ArrayInvertedLists", "BufferedIOReader", "BufferedIOWriter", "Clustering",
    "ClusteringParameters", "DirectMap", "DistanceComputer", "FileIOReader", "FileIOWriter", "IDSelector",
    "IDSelectorAll", "IDSelectorAnd", "IDSelectorArray", "IDSelectorBatch", "IDSelectorBitmap", "IDSelectorNot",
    "IDSelectorOr", "IDSelectorRange", "IDSelectorTranslated", "IDSelectorXOr", "IOReader", "IOWriter",
    "IVFSearchParameters", "Index", "IndexFlat", "IndexFlatCodes", "IndexFlatIP", "IndexFlatL2", "IndexIDMap",
    "IndexIDMap2", "IndexIVF", "IndexIVFFlat", "IndexIVFPQ", "IndexIVFPQFastScan", "IndexIVFScalarQuantizer",
    "IndexIVFStats", "IndexPQ", "IndexPQFastScan", "IndexPQStats", "IndexPreTransform", "IndexRefine",
    "IndexRefineFlat", "IndexRefineSearchParameters", "IndexScalarQuantizer", "IndexShards", "InvertedLists", "Kmeans",
    "LinearTransform", "NormalizationTransform", "OPQMatrix", "PCAMatrix", "ParameterSpace", "PolysemousTraining",
    "ProductQuantizer",
    "PyCallbackIDSelector", "PyCallbackIOReader", "PyCallbackIOWriter", "RandomRotationMatrix", "ResultHeap",
    "ScalarQuantizer", "SearchParameters", "SearchParametersIVF", "SearchParametersPQ",
    "SearchParametersPreTransform", "VectorIOReader", "VectorIOWriter", "VectorTransform", "ZeroCopyIOReader",
    "check_compatible_for_merge", "clone_index", "copy_array_to_vector", "cvar", "deserialize_index",
    "downcast_InvertedLists", "downcast_Quantizer", "downcast_VectorTransform", "downcast_index",
    "eval_intersection", "extract_index_ivf", "get_invlist_range", "get_mem_usage_kb", "imbalance_factor",
    "index_factory", "is_similarity_metric", "kmin", "knn", "merge_into", "merge_knn_results", "normalize_L2",
    "omp_get_max_threads", "omp_set_num_threads", "pairwise_distances", "rand", "randint", "randn",
    "range_search_with_parameters", "read_ProductQuantizer", "read_VectorTransform", "read_index",
    "search_and_return_centroids", "search_centroid", "search_with_parameters", "serialize_index",
    "set_invlist_range", "swig_ptr", "try_extract_index_ivf", "vector_float_to_array", "vector_to_array",
    "write_ProductQuantizer", "write_VectorTransform", "write_index",
]  # fmt: skip
