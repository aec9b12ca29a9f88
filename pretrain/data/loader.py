"""The steps of one process from corpora, prepared ahead of training by a thread."""

from collections.abc import Iterator

import torch

from lrnn.pretrain.batching import Batching
from lrnn.pretrain.data.micro_batch import MicroBatch
from lrnn.pretrain.data.prefetch import Prefetcher, set_thread_device
from lrnn.pretrain.data.samples import CorpusData, check_enough_samples

LOCATE_SAMPLES = 1024  # samples per process whose place in the corpora is computed at once


class Loader(Prefetcher):
    """Iterate over the steps of one process without end: each item is the list of its micro-batches of a step.

    Step s takes the samples from `s * global_batch_size` on, spread over processes as `Batching` says.

    Args:
        data: the samples.
        batching: batch sizes, and the place of this process among all.
        start_sample: number of samples that the run has already consumed.
        pin_memory: return tensors in page-locked memory.
        prefetch: number of steps that are prepared ahead.

    Raises:
        UserError: there are more processes than samples.
    """

    stream_state: dict | None = None  # Only a `StreamLoader` has one; here the number of samples is enough.
    left_out: dict[str, list] = {}  # noqa: RUF012, a corpus left out what it had to when it was built

    def __init__(
        self,
        data: CorpusData,
        batching: Batching,
        start_sample: int = 0,
        pin_memory: bool = False,
        prefetch: int = 2,
    ):
        check_enough_samples(data, batching.world_size)
        super().__init__(prepared(steps_from(data, batching, start_sample), pin_memory), prefetch)


def steps_from(
    data: CorpusData, batching: Batching, start: int, stop: int | None = None, origin: int = 0
) -> Iterator[list[MicroBatch]]:
    """Yield the steps of one process that begin at sample `start` or later, and before `stop`.

    Args:
        data: the samples.
        batching: batch sizes, and the place of this process among all.
        start: number of the first sample.
        stop: number of a sample; None for steps without end.
        origin: number in the run of the first sample of `data`.
    """
    # Many samples are located at once: for a few, numpy's overhead would exceed all other work.
    at_once = max(1, LOCATE_SAMPLES * batching.world_size // batching.global_batch_size)  # steps
    while stop is None or start < stop:
        ahead = at_once if stop is None else min(at_once, -(-(stop - start) // batching.global_batch_size))
        indices = batching.own_samples(start, ahead)
        corpus, window = (found.reshape(indices.shape) for found in data.locate(indices.ravel() - origin))
        for step in range(ahead):
            yield list(map(data.gather, corpus[step], window[step], indices[step]))
        start += ahead * batching.global_batch_size


def prepared(steps: Iterator[list[MicroBatch]], pin_memory: bool) -> Iterator[list[MicroBatch]]:
    """Return an iterator over `steps` for a thread, with tensors in page-locked memory if `pin_memory`."""
    device = torch.cuda.current_device() if pin_memory else None

    def items() -> Iterator[list[MicroBatch]]:
        set_thread_device(device)
        for batches in steps:
            yield [batch.pin_memory() for batch in batches] if pin_memory else batches

    return items()
