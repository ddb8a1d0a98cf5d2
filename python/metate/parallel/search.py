"""An index over the ranks of a process group: each holds a part of the vectors, searches are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from metate.errors import fail, require_choice
from metate.search import Index, load
from metate.search.arrays import Array, tensor_of
from metate.search.filters import Filter

SHARDINGS = ("vector", "list")


class ShardedIndex:
    """Parts of one index on the ranks of a group. All ranks make the same calls with the same arguments.

    Results are those of one index, but with refinement, where every rank chooses candidates, so that more of them are
    ranked by full vectors.

    Args:
        local: an empty index of the same kind on every rank; afterwards this rank's part. A rank may add vectors of its
            own to it, under ids that no other rank uses.
        group: default: all ranks.
        by: "vector" deals vectors out by their ids; "list" gives every rank whole lists.

    Raises:
        ValueError: `by` is none of these, or "list" of an index that has none. Methods raise what those of the index
        do, on every rank.
    """

    def __init__(self, local: Index, group: dist.ProcessGroup | None = None, *, by: str = "vector") -> None:
        op = "parallel.ShardedIndex"
        require_choice(op, "by", by, SHARDINGS)
        if by == "list" and local.nlist is None:
            raise fail(op, "by", "'list'", "'vector': this index has no lists")
        self.local, self.group, self.by = local, group, by
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._next_id = 0

    @property
    def ntotal(self) -> int:
        """Vectors on all ranks."""
        return int(self._sum(self.local.ntotal))

    @property
    def is_trained(self) -> bool:
        return self.local.is_trained

    def _sum(self, number: int) -> int:
        total = torch.tensor(number, device=self.local.device)
        dist.all_reduce(total, group=self.group)
        return int(total)

    def train(self, x: Array) -> None:
        """The first rank trains; its x alone is looked at. An error there is raised everywhere."""
        found: list[Any] = [None]
        if self.rank == 0:
            try:
                self.local.train(x)
                found = [{name: tensor.cpu() for name, tensor in self.local.trained().items()}]
            except Exception as error:
                found = [error]
        dist.broadcast_object_list(found, dist.get_global_rank(self.group, 0) if self.group else 0, self.group)
        if isinstance(found[0], Exception):
            raise found[0]
        self.local.set_trained(found[0])

    def add(self, x: Array) -> None:
        """Of vectors (n, dim), given to all ranks, each adds its part; ids go on from the largest so far."""
        self.add_with_ids(x, np.arange(self._next_id, self._next_id + len(x)))

    def add_with_ids(self, x: Array, ids: Array) -> None:
        """Of vectors (n, dim) with ids (n,), given to all ranks, each adds its part."""
        numbers = np.asarray(tensor_of("parallel.ShardedIndex", "ids", ids).cpu())
        owner = (self.local.assign(x) if self.by == "list" else numbers) % self.ranks
        mine = np.flatnonzero(owner == self.rank)
        refused: Exception | None = None
        try:  # all ids, for another rank may have been given one of them
            self.local._check_new("parallel.ShardedIndex", self.local._state, numbers)
            self.local.add_with_ids(tensor_of("parallel.ShardedIndex", "x", x)[torch.from_numpy(mine)], numbers[mine])
        except (ValueError, TypeError, RuntimeError) as error:
            refused = error
        if self._sum(refused is not None):  # all ranks add, or none
            if refused is None:
                self.local.remove_ids(numbers[mine])
            raise refused or fail("parallel.ShardedIndex", "x or ids", "refused by another rank", "what all ranks take")
        self._next_id = max(self._next_id, int(numbers.max()) + 1 if len(numbers) else 0)

    def remove_ids(self, which: Filter) -> int:
        """How many were removed on all ranks."""
        return self._sum(self.local.remove_ids(which))

    def search(
        self, queries: Array, k: int, *, nprobe: int | None = None, filter: Filter | None = None,
        refine_factor: int = 4,
    ) -> tuple[Any, Any]:  # fmt: skip
        """As `Index.search`, of the vectors of all ranks."""
        asked = tensor_of("parallel.ShardedIndex", "queries", queries)
        mine = self.local.search(asked, k, nprobe=nprobe, filter=filter, refine_factor=refine_factor)
        parts = []
        for tensor in mine:
            tensor = tensor.to(self.local.device).contiguous()
            everywhere = [torch.empty_like(tensor) for _ in range(self.ranks)]
            dist.all_gather(everywhere, tensor, group=self.group)
            parts.append(torch.cat(everywhere, -1))
        distances, ids = parts
        order = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids).argsort(dim=-1, stable=True)
        distances, ids = distances.gather(-1, order), ids.gather(-1, order)
        order = distances.argsort(dim=-1, stable=True, descending=self.local.largest)[..., :k]
        best = distances.gather(-1, order).to(asked.device), ids.gather(-1, order).to(asked.device)
        return best if isinstance(queries, torch.Tensor) else (best[0].numpy(), best[1].numpy())

    def save(self, path: str | Path) -> None:
        """Each rank writes its part, "<path>.<rank>-of-<ranks>"."""
        self.local.save(self._part(path))

    def load(self, path: str | Path, *, mmap: bool = False) -> None:
        """Takes the part that `save` wrote, by as many ranks. An error of one is raised everywhere."""
        found = self.local
        refused: Exception | None = None
        try:
            found = load(self._part(path), mmap=mmap, device=self.local.device)
        except (OSError, ValueError) as error:
            refused = error
        if self._sum(refused is not None):  # else the others would wait for this rank for ever
            raise refused or fail(
                "parallel.ShardedIndex", "path", "refused by another rank", "what every rank can load"
            )
        self.local = found
        newest = torch.tensor(self.local.next_id, device=self.local.device)
        dist.all_reduce(newest, dist.ReduceOp.MAX, self.group)
        self._next_id = int(newest)

    def _part(self, path: str | Path) -> Path:
        return Path(f"{path}.{self.rank}-of-{self.ranks}")
