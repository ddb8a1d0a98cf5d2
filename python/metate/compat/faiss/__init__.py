"""faiss' indexes, selectors, transforms and files over metate.search, with numpy arrays or tensors.

Import it as it is, or let `metate.compat.install("faiss")` put it under the name `faiss`.
"""

from metate.compat.faiss.absent import (
    IndexBinary,
    IndexBinaryIVF,
    IndexHNSW,
    IndexIVFRaBitQ,
    IndexLSH,
    IndexRaBitQ,
    ITQTransform,
    MultiIndexQuantizer,
)
from metate.compat.faiss.arrays import (
    RangeSearchResult,
    ResultHeap,
    bucket_sort,
    copy_array_to_vector,
    eval_intersection,
    get_mem_usage_kb,
    get_num_gpus,
    imbalance_factor,
    matrix_bucket_sort_inplace,
    memcpy,
    merge_knn_results,
    pairwise_distances,
    rev_swig_ptr,
    swig_ptr,
    vector_float_to_array,
    vector_to_array,
)
from metate.compat.faiss.base import DistanceComputer, Index
from metate.compat.faiss.clustering import Clustering, Kmeans, kmin, knn
from metate.compat.faiss.composite import (
    IndexIDMap,
    IndexIDMap2,
    IndexPreTransform,
    IndexRefine,
    IndexRefineFlat,
    IndexShards,
)
from metate.compat.faiss.distances import (
    METRIC_GOWER,
    METRIC_INNER_PRODUCT,
    METRIC_L1,
    METRIC_L2,
    METRIC_BrayCurtis,
    METRIC_Canberra,
    METRIC_Jaccard,
    METRIC_JensenShannon,
    METRIC_Linf,
    METRIC_Lp,
    METRIC_NaNEuclidean,
    is_similarity_metric,
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
    shard_ivf_index_centroids,
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
    Index2Layer,
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
    "IO_FLAG_MMAP", "IO_FLAG_MMAP_IFC", "IO_FLAG_READ_ONLY", "IO_FLAG_SKIP_PRECOMPUTE_TABLE", "METRIC_GOWER",
    "METRIC_INNER_PRODUCT", "METRIC_L1", "METRIC_L2", "ArrayInvertedLists", "BufferedIOReader", "BufferedIOWriter",
    "Clustering", "ClusteringParameters", "DirectMap", "DistanceComputer", "FileIOReader", "FileIOWriter",
    "IDSelector", "IDSelectorAll", "IDSelectorAnd", "IDSelectorArray", "IDSelectorBatch", "IDSelectorBitmap",
    "IDSelectorNot", "IDSelectorOr", "IDSelectorRange", "IDSelectorTranslated", "IDSelectorXOr", "IOReader",
    "IOWriter", "ITQTransform", "IVFSearchParameters", "Index", "Index2Layer", "IndexBinary", "IndexBinaryIVF",
    "IndexFlat", "IndexFlatCodes", "IndexFlatIP", "IndexFlatL2", "IndexHNSW", "IndexIDMap", "IndexIDMap2", "IndexIVF",
    "IndexIVFFlat", "IndexIVFPQ", "IndexIVFPQFastScan", "IndexIVFRaBitQ", "IndexIVFScalarQuantizer", "IndexIVFStats",
    "IndexLSH", "IndexPQ", "IndexPQFastScan", "IndexPQStats", "IndexPreTransform", "IndexRaBitQ", "IndexRefine",
    "IndexRefineFlat", "IndexRefineSearchParameters", "IndexScalarQuantizer", "IndexShards", "InvertedLists",
    "Kmeans", "LinearTransform", "METRIC_BrayCurtis", "METRIC_Canberra", "METRIC_Jaccard", "METRIC_JensenShannon",
    "METRIC_Linf", "METRIC_Lp", "METRIC_NaNEuclidean", "MultiIndexQuantizer", "NormalizationTransform", "OPQMatrix",
    "PCAMatrix", "ParameterSpace", "PolysemousTraining", "ProductQuantizer", "PyCallbackIDSelector",
    "PyCallbackIOReader", "PyCallbackIOWriter", "RandomRotationMatrix", "RangeSearchResult", "ResultHeap",
    "ScalarQuantizer", "SearchParameters", "SearchParametersIVF", "SearchParametersPQ",
    "SearchParametersPreTransform", "VectorIOReader", "VectorIOWriter", "VectorTransform", "ZeroCopyIOReader",
    "bucket_sort", "check_compatible_for_merge", "clone_index", "copy_array_to_vector", "cvar", "deserialize_index",
    "downcast_InvertedLists", "downcast_Quantizer", "downcast_VectorTransform", "downcast_index", "eval_intersection",
    "extract_index_ivf", "get_invlist_range", "get_mem_usage_kb", "get_num_gpus", "imbalance_factor", "index_factory",
    "is_similarity_metric", "kmin", "knn", "matrix_bucket_sort_inplace", "memcpy", "merge_into", "merge_knn_results",
    "normalize_L2", "omp_get_max_threads", "omp_set_num_threads", "pairwise_distances", "rand", "randint", "randn",
    "range_search_with_parameters", "read_ProductQuantizer", "read_VectorTransform", "read_index", "rev_swig_ptr",
    "search_and_return_centroids", "search_centroid", "search_with_parameters", "serialize_index",
    "set_invlist_range", "shard_ivf_index_centroids", "swig_ptr", "try_extract_index_ivf", "vector_float_to_array",
    "vector_to_array", "write_ProductQuantizer", "write_VectorTransform", "write_index",
]  # fmt: skip
