"""The block manager beside a model of it in plain Python: random operations, prefixes, misuse, the hook."""

import os
import random
import threading
import time
from collections import Counter

import pytest

runtime = pytest.importorskip("metate._runtime", reason="not built: run `pip install .` in metate's source")
BlockManager, CacheFull = runtime.BlockManager, runtime.CacheFull
OPERATIONS = int(os.environ.get("METATE_TEST_BLOCKS", "100000"))  # 10 M in the long target


class Model:
    """Sequences as lists of (block, tokens of it), a shared block being one object; what is cached is not modelled."""

    def __init__(self, manager, blocks, size):
        self.manager, self.blocks, self.size, self.sequences = manager, blocks, size, {}

    def blocks_of(self, length):
        return -(-length // self.size)

    def table(self, name):
        return [block for block, _ in self.sequences[name]]

    def tokens(self, name):
        return [token for _, tokens in self.sequences[name] for token in tokens]

    def owners(self):
        return Counter(block for name in self.sequences for block in self.table(name))

    def allocate(self, name, tokens):
        """A prefix that somebody has written; never the last token."""
        hits = self.manager.allocate(name, tokens)
        assert hits % self.size == 0 and hits < max(len(tokens), 1)
        table = self.manager.table(name)
        assert self.manager.tokens(name) == tokens[:hits]
        self.sequences[name] = [
            (block, tokens[i * self.size : (i + 1) * self.size]) for i, block in enumerate(table)
        ]  # fmt: skip
        return hits

    def append(self, name, tokens):
        mine, owners = self.sequences[name], self.owners()
        length = len(self.tokens(name))
        shared = length % self.size and owners[mine[-1][0]] > 1
        needed = self.blocks_of(length + len(tokens)) - len(mine) + bool(shared and tokens)
        room = self.blocks - len(owners)
        assert self.manager.available() == room
        if needed > room:
            with pytest.raises(CacheFull, match=f"needs {needed} more blocks of {self.size} tokens, {room} of"):
                self.manager.append(name, tokens)
            return
        slots, copies = self.manager.append(name, tokens)
        if shared and tokens:
            assert [source for source, _ in copies] == [mine[-1][0]]
            assert copies[0][1] not in owners
            mine[-1] = (copies[0][1], list(mine[-1][1]))
        else:
            assert copies == []
        if mine and len(mine[-1][1]) < self.size:
            mine[-1] = (mine[-1][0], list(mine[-1][1]))
        for slot, token in zip(slots, tokens, strict=True):
            block, row = divmod(slot, self.size)
            if row == 0:
                assert block not in owners and block not in self.table(name), "a block in use was given away"
                mine.append((block, []))
            assert mine[-1][0] == block and len(mine[-1][1]) == row
            mine[-1][1].append(token)

    def fork(self, parent, child):
        self.manager.fork(parent, child)
        self.sequences[child] = [(block, list(tokens)) for block, tokens in self.sequences[parent]]

    def truncate(self, name, length):
        self.manager.truncate(name, length)
        del self.sequences[name][self.blocks_of(length) :]
        if length % self.size:
            block, tokens = self.sequences[name][-1]
            self.sequences[name][-1] = (block, tokens[: length % self.size])

    def free(self, name):
        self.manager.free(name)
        del self.sequences[name]

    def compare(self, name):
        assert self.manager.table(name) == self.table(name)
        assert self.manager.tokens(name) == self.tokens(name)
        assert self.manager.length(name) == len(self.tokens(name))


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["prefix cache", "none"])
@pytest.mark.parametrize("hash_mask", [2**64 - 1, 3], ids=["hash", "collisions"])
def test_random_operations(prefix_cache, hash_mask):
    """Tables, contents, copies, room and errors are those of the model; nothing leaks."""
    for seed in range(8):
        draw = random.Random(f"{seed} {prefix_cache} {hash_mask}")
        blocks, size = draw.choice([(7, 1), (20, 2), (50, 3), (40, 16)])
        manager = BlockManager(blocks, size, prefix_cache=prefix_cache, hash_mask=hash_mask)
        model, names = Model(manager, blocks, size), iter(range(10**12))
        texts = [draw.choices(range(3), k=5 * size) for _ in range(3)]
        for count in range(OPERATIONS // 32):
            _operate(draw, model, names, texts)
            if count % 200 == 0:
                manager.check()
        for name in list(model.sequences):
            model.free(name)
        manager.check()
        assert manager.available() == blocks
        assert manager.statistics()["used"] == manager.statistics()["sequences"] == 0
        assert bool(manager.statistics()["hits"]) == prefix_cache


def _operate(draw, model, names, texts):
    size = model.size
    often = 20 if model.manager.available() < 3 else 2
    action = draw.choices(["allocate", "append", "fork", "truncate", "free"], [4, 12, 1, 2, often])[0]
    if action == "allocate" or not model.sequences:
        name = next(names)
        prompt = draw.choice(texts)[: draw.randrange(5 * size)] + draw.choices(range(3), k=draw.randrange(size))
        before = model.manager.missing(prompt)
        room = model.manager.available()
        hits = model.allocate(name, prompt)
        assert before == room - model.manager.available() + model.blocks_of(len(prompt)) - hits // size
        model.append(name, prompt[hits : draw.randrange(hits, len(prompt) + 1)])
    else:
        name = draw.choice(list(model.sequences))
        if action == "append":
            model.append(name, draw.choices(range(3), k=draw.choice([0, 1, 1, 1, draw.randrange(3 * size)])))
        elif action == "fork":
            child = next(names)
            model.fork(name, child)
            name = child
        elif action == "truncate":
            model.truncate(name, draw.randrange(model.manager.length(name) + 1))
        else:
            model.free(name)
    if name in model.sequences:
        model.compare(name)


def test_a_prefix_is_found_again():
    manager = BlockManager(10, 4)
    assert manager.allocate(0, range(10)) == 0
    slots, copies = manager.append(0, range(10))
    assert (slots, copies) == (list(range(10)), [])
    assert manager.allocate(1, range(10)) == 8  # while it is in use
    assert manager.table(1) == [0, 1]
    manager.free(0)
    manager.free(1)
    assert manager.allocate(2, range(10)) == 8  # and after
    assert manager.allocate(3, range(8)) == 4  # the last token must run through the model
    assert manager.allocate(4, [9, *range(1, 10)]) == 0  # another beginning
    assert manager.missing(range(12)) == 1
    found = manager.statistics()
    assert (found["looked_up"], found["hits"], found["used"], found["cached"]) == (2 + 2 + 2 + 1 + 2, 5, 2, 0)


def test_equal_hashes_are_told_apart():
    """Every block in one bucket: the same tokens behind another prefix are another block."""
    manager = BlockManager(100, 2, hash_mask=0)
    prompts = [[a, b, 7, 7, c] for a in range(3) for b in range(3) for c in range(2)]
    for name, prompt in enumerate(prompts):
        manager.append(name, prompt[manager.allocate(name, prompt) :])
        assert manager.tokens(name) == prompt
    manager.check()


def test_the_least_recently_used_leaves_first_and_ends_before_beginnings():
    manager, told = BlockManager(4, 2), []
    manager.set_hook(lambda block, prefix: told.append(prefix))
    for name, prompt in enumerate(([1, 1, 1, 1], [2, 2, 2, 2])):
        manager.allocate(name, prompt)
        manager.append(name, prompt)
    manager.free(0)
    manager.free(1)
    assert manager.allocate(2, [1, 1, 9]) == 2  # used again: [1, 1] is the newest now
    manager.free(2)
    manager.allocate(3, [3])
    for step in range(3):
        manager.append(3, [3, 3])
        assert len(told) == step + 1
    assert told == [[1, 1, 1, 1], [2, 2, 2, 2], [2, 2]]
    assert manager.statistics()["evictions"] == 3


def test_a_hook_that_fails_changes_nothing():
    manager = BlockManager(2, 1)
    manager.allocate(0, [])
    manager.append(0, [5, 6])
    manager.free(0)
    manager.allocate(1, [])
    told = []

    def hook(block, prefix):
        told.append(prefix)
        if len(told) == 2:
            raise OSError("disk full")

    manager.set_hook(hook)
    with pytest.raises(OSError, match="disk full"):
        manager.append(1, [7, 7])
    manager.check()
    assert manager.tokens(1) == [] and manager.statistics()["evictions"] == 0
    manager.set_hook(lambda block, prefix: manager.free(1))
    with pytest.raises(RuntimeError, match="by its own hook"):
        manager.append(1, [7])
    manager.set_hook(None)
    manager.append(1, [7, 7])
    manager.check()


def test_a_second_thread_is_refused():
    manager = BlockManager(1, 1)
    manager.allocate(0, [])
    manager.append(0, [1])
    manager.free(0)
    entered, leave = threading.Event(), threading.Event()
    manager.set_hook(lambda block, prefix: (entered.set(), leave.wait(10)))
    manager.allocate(1, [])
    other = threading.Thread(target=lambda: manager.append(1, [2]))
    other.start()
    assert entered.wait(10)
    with pytest.raises(RuntimeError, match="second thread"):
        manager.free(1)
    leave.set()
    other.join()
    assert manager.tokens(1) == [2]


def test_the_one_who_writes_copies():
    manager = BlockManager(4, 4)
    manager.allocate(0, [])
    manager.append(0, [1, 2])
    manager.fork(0, 1)
    assert manager.append(1, [3]) == ([6], [(0, 1)])
    assert manager.append(0, [4]) == ([2], [])  # alone now
    assert (manager.tokens(0), manager.tokens(1)) == ([1, 2, 4], [1, 2, 3])
    assert manager.statistics()["copies"] == 1


def test_what_was_truncated_is_not_offered():
    manager = BlockManager(4, 2)
    manager.allocate(0, [])
    manager.append(0, [1, 2, 3, 4])
    manager.truncate(0, 3)
    assert manager.allocate(1, [1, 2, 3, 4, 5]) == 2
    manager.append(0, [9])
    assert manager.allocate(2, [1, 2, 3, 9, 5]) == 4
    manager.check()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.append(7, [1]), ValueError, "append: sequence is 7, expected one of the 1 that are allocated"),
        (lambda m: m.free(7), ValueError, "free: sequence is 7"),
        (lambda m: m.fork(7, 8), ValueError, "fork: sequence is 7"),
        (lambda m: m.fork(0, 0), ValueError, "fork: sequence is 0, which is allocated already"),
        (lambda m: m.allocate(0, []), ValueError, "allocate: sequence is 0, which is allocated already"),
        (lambda m: m.truncate(0, 4), ValueError, "truncate: length is 4, expected 0 to 3"),
        (lambda m: m.truncate(0, -1), ValueError, "truncate: length is -1"),
        (lambda m: m.append(0, [1, -1]), ValueError, "append: a token is -1, expected 0 to"),
        (lambda m: m.allocate(1, [2**31]), ValueError, "allocate: a token is 2147483648"),
        (lambda m: m.append(0, [1.5]), TypeError, "append"),
        (lambda m: m.append(0, "text"), TypeError, "append"),
        (lambda m: m.append(0, [1] * 6), CacheFull, "append: sequence 0 needs 3 more blocks of 2 tokens, 2 of 4"),
        (lambda m: BlockManager(0, 2), ValueError, "blocks is 0, expected 1 to"),
        (lambda m: BlockManager(2, -1), ValueError, "block_size is -1"),
    ],
)  # fmt: skip
def test_misuse_is_named_and_changes_nothing(call, error, message):
    manager = BlockManager(4, 2)
    manager.allocate(0, [])
    manager.append(0, [1, 2, 3])
    before = manager.statistics(), manager.table(0), manager.tokens(0)
    with pytest.raises(error, match=message):
        call(manager)
    manager.check()
    assert (manager.statistics(), manager.table(0), manager.tokens(0)) == before


def test_a_double_free_is_an_error():
    manager = BlockManager(4, 2)
    manager.allocate(0, [])
    manager.free(0)
    with pytest.raises(ValueError, match=r"a sequence that was freed is gone"):
        manager.free(0)


def test_a_token_costs_the_same_in_a_long_sequence():
    manager = BlockManager(70_000, 16)
    manager.allocate(0, [])

    def microseconds():
        best = 1e9
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(200):
                manager.append(0, [1])
            best = min(best, (time.perf_counter() - began) * 5000)
        return best

    short = microseconds()
    manager.append(0, [2] * 1_000_000)
    assert microseconds() < 5 * short + 2
