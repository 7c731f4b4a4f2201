"""Running rows in batches that fit into memory: a batch that does not is halved and tried again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from harden import processes
from harden.models import ChatModel

logger = logging.getLogger(__name__)

BACKWARD_ROWS = 8  # a row that is differentiated keeps every layer's activations: it counts as so many rows

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_batches(
    chat_model: ChatModel,
    items: Sequence[Item],
    batch_size: int,
    work: Callable[[Sequence[Item]], list[Result]],
    rows_per_item: int = 1,
) -> list[Result]:
    """All results of `work`, called on at most `batch_size` items at a time.

    Where a batch runs out of memory it is halved, down to one item, and `chat_model.largest_batch` remembers, in rows
    of a forward pass, what is tried from then on. Under FSDP no batch is halved: all processes must run the same
    passes.
    """
    results: list[Result] = []
    while len(results) < len(items):
        fitting = batch_size
        if chat_model.largest_batch:
            fitting = min(batch_size, max(1, chat_model.largest_batch // rows_per_item))
        size = min(fitting, len(items) - len(results))
        try:
            results += work(items[len(results) : len(results) + size])
        except RuntimeError as error:
            if size == 1 or processes.sharded() or not should_reduce_batch_size(error):
                raise
            chat_model.largest_batch = size // 2 * rows_per_item
        else:
            continue
        clear_device_cache(garbage_collection=True)  # outside the handler: the error holds on to the tensors
        logger.info("out of memory with %d rows; going on with %d", size * rows_per_item, chat_model.largest_batch)
    return results
