"""An index over 2 and 4 gloo processes finds what one index finds."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from metate.parallel.search import ShardedIndex
from metate.search import FlatIndex, IVFPQIndex

D = 8
MAKE = {
    "flat, by vector": lambda: FlatIndex(D, "inner_product"),
    "ivfpq, by vector": lambda: IVFPQIndex(D, 6, 2, 4),
    "ivfpq, by list": lambda: IVFPQIndex(D, 6, 4, 4, "cosine"),
}


def data():
    random = np.random.default_rng(0)
    return random.standard_normal((90, D)).astype(np.float32), random.standard_normal((5, D)).astype(np.float32)


def changed(index, x):
    """The same changes of one index or of a sharded one, and how many were removed."""
    index.train(x)
    index.add(x[:50])
    index.add_with_ids(x[50:], np.arange(1000, 1040))
    index.add(x[:1])
    return index.remove_ids(range(0, 1010, 4)), index.ntotal


def work(rank, ranks, folder, expected):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    x, queries = data()
    for name, (counts, found, filtered) in expected.items():
        index = ShardedIndex(MAKE[name](), by=name.split()[-1])
        assert changed(index, x) == counts, name
        assert index.local.ntotal < counts[1]
        for _ in range(2):
            how = {} if index.local.nlist is None else {"nprobe": 3}
            for got, want in zip(index.search(queries, 7, **how), found, strict=True):
                assert np.array_equal(got, want), name
            one = index.search(torch.from_numpy(queries[0]), 70, filter=range(20), **how)
            for got, want in zip(one, filtered, strict=True):
                assert np.array_equal(got, want), name
            index.save(f"{folder}/{name}")
            again = ShardedIndex(MAKE[name](), by=name.split()[-1])
            again.load(f"{folder}/{name}", mmap=True)
            index = again
        before = index.local.ntotal
        for ids in ([2000, 2001, 2002, 1002], [2000, 2000, 2001, 2002]):
            with pytest.raises(ValueError, match=r"holding (1002|2000) twice|by another rank"):
                index.add_with_ids(x[:4], np.array(ids))
            assert index.local.ntotal == before and index.ntotal == counts[1]
        index.add(x[1:2])
        assert index.search(x[1:2], 90, **({} if index.local.nlist is None else {"nprobe": 6}))[1].max() == 1041
    with pytest.raises(ValueError, match="5 vectors"):
        ShardedIndex(IVFPQIndex(D, 6, 4, 4)).train(x[:5])
    if rank == 1:
        Path(f"{folder}/{name}.1-of-{ranks}").unlink()
    with pytest.raises((ValueError, OSError), match=r"a file that exists|by another rank"):
        index.load(f"{folder}/{name}")
    assert index.ntotal == counts[1] + 1
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_equals_one(ranks, tmp_path):
    x, queries = data()
    expected = {}
    for name, make in MAKE.items():
        index = make()
        counts = changed(index, x)
        how = {} if index.nlist is None else {"nprobe": 3}
        filtered = index.search(torch.from_numpy(queries[0]), 70, filter=range(20), **how)
        expected[name] = counts, index.search(queries, 7, **how), tuple(t.numpy() for t in filtered)
    multiprocessing.set_forkserver_preload(["metate.parallel.search"])  # imported once, not in every process
    processes.start_processes(work, (ranks, str(tmp_path), expected), ranks, start_method="forkserver")
