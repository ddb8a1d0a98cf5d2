"""32 threads add, search and remove at once: every result is that of one snapshot, searched again alone; of the last of
them, and of what is there in the end, also what one thread makes of the same vectors. METATE_TEST_SOAK: seconds,
minutes in the long target."""

import copy
import os
import threading
import time
from collections import deque

import numpy as np
import pytest
import torch

from metate.search import FlatIndex, IVFFlatIndex, IVFPQIndex, PQIndex, load

SECONDS = float(os.environ.get("METATE_TEST_SOAK", "3"))
D, GROUP, WRITERS, READERS = 16, 8, 6, 26
MAKE = {
    "flat": lambda: (FlatIndex, {}),
    "pq": lambda: (PQIndex, {"M": 4, "bits": 4, "refine": "sq8"}),
    "ivf": lambda: (IVFFlatIndex, {"nlist": 4}),
    "ivfpq": lambda: (IVFPQIndex, {"nlist": 4, "M": 4, "bits": 8}),
}


class Seen(threading.local):
    state = None


def recorded(kind):
    """An index that notes the snapshot that each thread's search reads, and the same index empty, to compare with."""
    made, settings = MAKE[kind]()
    seen = Seen()

    class Recorded(made):
        def _trained(self, op):
            seen.state = super()._trained(op)
            return seen.state

    index, twin = Recorded(D, **settings), made(D, **settings)
    index.train(np.random.default_rng(0).standard_normal((600, D)).astype(np.float32), progress=False)
    twin.set_trained(index.trained())
    return index, twin, seen


def as_alone(index, state, queries, k, how):
    alone = object.__new__(type(index))  # not a copy: rows are shared
    alone.__dict__.update(index.__dict__)
    alone._state = state
    return alone.search(queries, k, **how)


def group(first):
    """The vectors under ids from `first` on, whenever they are asked for."""
    return np.random.default_rng(first).standard_normal((GROUP, D)).astype(np.float32)


def replayed(twin, state):
    """Given, one group after another, what a snapshot says that it holds."""
    twin.reset()
    ids = np.sort(state.lists.ids(state.lists.rows()))
    for first in ids[::GROUP].tolist():
        twin.add_with_ids(group(first), first + np.arange(GROUP))
    assert np.array_equal(ids, np.sort(twin._state.lists.ids(twin._state.lists.rows())))
    return twin


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class Soak:
    def __init__(self, indexes):
        self.indexes, self.stop, self.faults = indexes, threading.Event(), []
        self.kept = deque(maxlen=200)  # searches to do again in the end
        self.alive = [{kind: {} for kind in indexes} for _ in range(WRITERS)]
        self.changes, self.searches = [0] * WRITERS, [0] * READERS

    def guarded(self, work, number):
        random = np.random.default_rng(number + (1000 if work == self.read else 0))
        try:
            while not self.stop.is_set():
                work(number, random)
        except Exception as error:
            self.faults.append(error)
            self.stop.set()

    def write(self, number, random):
        """Groups under ids of this writer alone: a new one, or one less where there are many."""
        kind = random.choice(list(self.indexes))
        index, alive = self.indexes[kind][0], self.alive[number][kind]
        if len(alive) < 40 and random.random() < 0.7:
            ids = GROUP * (WRITERS * self.changes[number] + number) + np.arange(GROUP)
            alive[int(ids[0])] = x = group(int(ids[0]))
            index.add_with_ids(x, ids)
        elif alive:
            first = int(random.choice(list(alive)))
            del alive[first]
            assert index.remove_ids(range(first, first + GROUP)) == GROUP
        self.changes[number] += 1
        time.sleep(0.005)

    def read(self, number, random):
        kind = random.choice(list(self.indexes))
        index, _, seen = self.indexes[kind]
        queries = random.standard_normal((int(random.integers(1, 5)), D)).astype(np.float32)
        how = {} if index.nlist is None else {"nprobe": int(random.integers(1, 5))}
        if random.random() < 0.3:
            how["filter"] = lambda ids: ids % 3 != 0
        k = int(random.choice([1, 10, 300]))
        found = index.search(queries, k, **how)
        state = seen.state
        assert state.lists.total % GROUP == 0
        assert same(found, as_alone(index, state, queries, k, how)), f"{kind}, {state.lists.total} rows"
        if random.random() < 0.05:
            self.kept.append((kind, state, queries, k, how, found))
        self.searches[number] += 1


def megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_threads_search_add_and_remove():
    soak = Soak({kind: recorded(kind) for kind in MAKE})
    work = [(soak.write, i) for i in range(WRITERS)] + [(soak.read, i) for i in range(READERS)]
    threads = [threading.Thread(target=soak.guarded, args=one) for one in work]
    for thread in threads:
        thread.start()
    soak.stop.wait(SECONDS / 2)
    half = megabytes()
    soak.stop.wait(SECONDS / 2)
    whole = megabytes()
    soak.stop.set()
    for thread in threads:
        thread.join(60)
    assert not soak.faults, soak.faults[0]
    assert min(soak.changes) > 0 and min(soak.searches) > 0
    assert whole < 1.25 * half + 64, f"{half:.0f} MB, later {whole:.0f} MB"
    for kind, state, queries, k, how, found in soak.kept:
        index, twin, _ = soak.indexes[kind]
        assert same(found, as_alone(index, state, queries, k, how))
        assert same(found, replayed(twin, state).search(queries, k, **how)), kind
    queries = torch.randn(5, D, generator=torch.Generator().manual_seed(0)).numpy()
    for kind, (index, twin, _) in soak.indexes.items():
        twin.reset()
        there = {first: x for writer in soak.alive for first, x in writer[kind].items()}
        for first, x in there.items():
            twin.add_with_ids(x, first + np.arange(GROUP))
        assert index.ntotal == len(there) * GROUP
        how = {} if index.nlist is None else {"nprobe": index.nlist}
        assert same(index.search(queries, 50, **how), twin.search(queries, 50, **how)), kind


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfpq"])
def test_arrays_are_added_while_others_search(kind):
    """One by one, which goes a way of its own: a snapshot that was made late is still the one that was searched."""
    index, twin, seen = recorded(kind)
    how = {} if index.nlist is None else {"nprobe": index.nlist}
    stop, faults, added = threading.Event(), [], [0] * 2

    def write(number):
        random = np.random.default_rng(number)
        while not stop.is_set():
            index.add(random.standard_normal((int(random.choice([1, 1, 1, 5])), D)).astype(np.float32))
            added[number] += 1

    def read(number):
        random = np.random.default_rng(100 + number)
        while not stop.is_set():
            before = index.ntotal
            queries = random.standard_normal((2, D)).astype(np.float32)
            found = index.search(queries, 20, **how)
            state = seen.state
            assert before <= state.lists.total == state.next_id and found[1].max() < state.next_id
            assert same(found, as_alone(index, state, queries, 20, how))

    def guarded(work, number):
        try:
            work(number)
        except Exception as error:
            faults.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, args=(work, i)) for work in (write, read) for i in range(2)]
    for thread in threads:
        thread.start()
    stop.wait(SECONDS / 6)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not faults, faults[0]
    assert min(added) > 0 and index.ntotal == index.next_id
    if kind == "flat":
        twin.add(index.reconstruct(np.arange(index.ntotal)))
        queries = np.random.default_rng(7).standard_normal((5, D)).astype(np.float32)
        assert same(index.search(queries, 50), twin.search(queries, 50))


@pytest.mark.parametrize("kind", list(MAKE))
def test_saves_and_copies_are_of_one_snapshot(kind, tmp_path):
    """While groups are added and removed: what is loaded holds whole groups, and finds what its snapshot did."""
    _, index, _ = recorded(kind)
    how = {} if index.nlist is None else {"nprobe": index.nlist}
    stop, faults = threading.Event(), []
    queries = np.random.default_rng(1).standard_normal((5, D)).astype(np.float32)

    def write():
        random, turn = np.random.default_rng(0), 0
        while not stop.is_set():
            ids = GROUP * turn + np.arange(GROUP)
            index.add_with_ids(random.standard_normal((GROUP, D)).astype(np.float32), ids)
            if turn % 3 == 2:
                index.remove_ids(range(int(ids[0]) - GROUP, int(ids[0])))
            turn += 1
            time.sleep(0.005)

    def guarded():
        try:
            write()
        except Exception as error:
            faults.append(error)

    def whole(found, total):
        assert (np.bincount(found[1][found[1] >= 0] // GROUP) % GROUP == 0).all() and total % GROUP == 0

    thread = threading.Thread(target=guarded)
    thread.start()
    end, saves, path = time.monotonic() + SECONDS / 6, 0, tmp_path / "index"
    try:
        while time.monotonic() < end or saves < 3:
            index.save(path)
            for other in (load(path), load(path, mmap=True), copy.deepcopy(index)):
                found = other.search(queries[:1], max(other.ntotal, 1), **how)
                whole(found, other.ntotal)
                assert other.ntotal == 0 or (found[1] >= 0).all()
            saves += 1
    finally:
        stop.set()
        thread.join(60)
    assert not faults, faults[0]
    index.save(path)
    assert same(load(path).search(queries, 50, **how), index.search(queries, 50, **how))
