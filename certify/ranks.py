"""Several processes that share the work, as ``torchrun`` starts them."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

_Item = TypeVar("_Item")


class RankLost(RuntimeError):  # noqa: N818 - the name says what happened
    """Another process of the job is gone, and with it what this one waited for."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a job.

    `joined`, `told`, `in_turn`, `largest`, `total` and `agree` are calls that every process has to
    make, in the same order.

    Attributes:
        rank: of this one.
        count: of all.
        local: number of this one on its machine.
        own_gpus: whether no two share a GPU, so that NCCL can be used.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    own_gpus: bool = True

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    @property
    def own(self) -> slice:
        """What this process is to work on: every so manyth item."""
        return slice(self.rank, None, self.count)

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """The items that this process is to work on."""
        return items[self.own]

    def joined(self, own: Sequence[_Item]) -> list[_Item]:
        """All results, in the order of the items that were shared; each process gets them."""
        if self.count == 1:
            return list(own)
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, list(own))
        total = sum(map(len, found))
        return [found[index % self.count][index // self.count] for index in range(total)]

    def told(self, make: Callable[[], _Item]) -> _Item:
        """What the first process makes, for all of them; or they all raise what it raised."""
        if self.count == 1:
            return make()
        made: list[Any] = [None, None]
        if self.first:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        distributed.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        item: _Item = made[0]
        return item

    def in_turn(self, make: Callable[[], _Item]) -> _Item:
        """What each process makes, one process of each machine before the others."""
        if self.count == 1:
            return make()
        made = make() if self.local == 0 else None
        distributed.barrier()
        return make() if made is None else made

    def largest(self, *numbers: float) -> list[float]:
        """The largest of each number over all processes."""
        if self.count == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return found.tolist()

    def total(self, own: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        own = own.cpu()
        if self.count > 1:
            distributed.all_reduce(own)
        return own

    def agree(self, item: object, what: str) -> None:
        """Raise a ``ValueError``, all of them, unless all have the same."""
        if self.count == 1:
            return
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, item)
        if any(other != found[0] for other in found):
            raise ValueError(
                f"the processes of this job have different {what}; was a file replaced while it "
                "was read, or is a factory random?"
            )


ALONE = Ranks()
"""A process that does all of the work."""


@contextmanager
def job() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started with this one, if it did.

    Each takes the GPU of its local rank. What is on GPUs is exchanged by NCCL, if no two processes
    share one, all else by gloo. Nobody waits for a process that is gone, as ``torchrun`` ends such
    a job, and for one that is slow as long as it takes.

    Raises:
        RankLost: another process has ended before its time, or was never there.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local % gpus)
    rank = os.environ.get("RANK", "?")
    nccl = gpus > 0 and distributed.is_nccl_available()
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timedelta(days=30)
        )
        yield Ranks(distributed.get_rank(), count, local, nccl and _own_gpus(count))
    except RuntimeError as error:
        if not _is_about_others(error):
            _leave()
            raise
        reason = str(error).strip().split(". ")[0]
        raise RankLost(
            f"rank {rank} ends as another process of this job is gone; torchrun tells which "
            f"({reason})"
        ) from error
    except BaseException:
        _leave()
        raise
    _leave()


def _own_gpus(count: int) -> bool:
    """Whether each process has a GPU to itself."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    names: list[Any] = [None] * count
    own = platform.node(), str(getattr(properties, "uuid", torch.cuda.current_device()))
    distributed.all_gather_object(names, own)
    return len(set(names)) == count


def _leave() -> None:
    gc.collect()  # what still holds the group would end the process with an abort
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _is_about_others(error: RuntimeError) -> bool:
    """Whether another process is not there; such failures have no type of their own."""
    signs = (
        "closed by peer",
        "reset by peer",
        "broken pipe",
        "remote process",
        "failed to connect",
    )
    said = str(error).lower()
    return isinstance(error, distributed.DistNetworkError) or any(sign in said for sign in signs)
