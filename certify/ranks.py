"""Several processes that share the work, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Ranks:
    """The processes of a job.

    Attributes:
        rank: of this one.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """What this process is to work on: every so manyth item."""
        return items[self.rank :: self.count]

    def joined(self, own: Sequence[_Item]) -> list[_Item]:
        """All results, in the order of the items that were shared; each process gets them."""
        if self.count == 1:
            return list(own)
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, list(own))
        total = sum(map(len, found))
        return [found[index % self.count][index // self.count] for index in range(total)]


ALONE = Ranks()
"""A process that does all of the work."""


@contextmanager
def job() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started with this one, if it did.

    Each takes the GPU of its local rank, if there are as many, and gloo talks between them: what
    they exchange is small and on the CPU.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    distributed.init_process_group("gloo")
    try:
        yield Ranks(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()
