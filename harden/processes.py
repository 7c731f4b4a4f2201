"""Dividing work between the processes of an `accelerate launch`; with one process everything is local."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce

Item = TypeVar("Item")
Result = TypeVar("Result")


def sharded() -> bool:
    """Whether the launch configuration asks for FSDP; all processes must then run the same forward passes."""
    return count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def use_all_cores() -> None:
    """Divide the cores between the processes of this machine when running on a CPU.

    OMP_NUM_THREADS is respected, but for a 1 under `accelerate launch` or torchrun, which set it themselves where
    nothing else is asked for.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    launched = not {"ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"}.isdisjoint(os.environ)
    if state().device.type == "cpu" and (threads is None or (threads == "1" and launched)):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", count()))
        torch.set_num_threads(max(1, cores // local))


def state() -> PartialState:
    """The state of this launch. Without an accelerator the processes are told to meet on the CPU (gloo)."""
    return PartialState(cpu=not torch.accelerator.is_available())


def is_main() -> bool:
    return state().is_main_process


def count() -> int:
    return state().num_processes


def my_share(items: Sequence[Item]) -> list[tuple[Item, float]]:
    """This process's items, each with weight 1; short shares are filled up with items of weight 0.

    All processes get equally many, so that they run the same number of forward passes (FSDP needs that).
    Raises ValueError for an empty sequence.
    """
    if not items:
        raise ValueError("nothing to divide")
    size = -(-len(items) // count())
    start = state().process_index * size
    share = [(item, 1.0) for item in items[start : start + size]]
    return share + [(items[0], 0.0)] * (size - len(share))


def divide(items: Sequence[Item], work: Callable[[list[Item]], list[Result]]) -> list[Result]:
    """Run `work` on this process's share of the items and return all processes' results in the items' order."""
    if not items:
        return []
    if count() == 1:
        return work(list(items))
    return gather(work([item for item, _ in my_share(items)]), len(items))


def gather(results: list[Result], n: int) -> list[Result]:
    """All processes' results for `n` items that were divided by `my_share`, in the items' order."""
    return gather_object(results)[:n] if count() > 1 else results


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over the processes."""
    return reduce(tensor, "sum") if count() > 1 else tensor


def from_main(make: Callable[[], Result]) -> Result:
    """Call `make` on the main process only and give its result to all."""
    box = [make() if is_main() else None]
    if count() > 1:
        broadcast_object_list(box)
    return box[0]


def wait() -> None:
    state().wait_for_everyone()


def finish() -> None:
    """Part in good order: a process that leaves while another still listens would abort it."""
    if count() > 1:
        wait()
        state().destroy_process_group()
