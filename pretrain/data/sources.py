"""The data of a run, from its configuration: corpora or a stream, the loader, and the held-out split."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.pretrain.config import Config, StreamSource
from lrnn.pretrain.corpus.reader import TokenCorpus, check_model_matches_corpora
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.data.loader import (
    CorpusData,
    Loader,
    MicroBatch,
    accumulation_steps,
    check_enough_samples,
    heldout_batches,
    model_inputs,
)
from lrnn.pretrain.corpus.sources import DatasetArguments
from lrnn.pretrain.data.stream import StreamData, StreamLoader
from lrnn.tokenizer import load_tokenizer


@dataclass
class Data:
    """What a run trains on."""

    source: CorpusData | StreamData
    description: dict[str, Any]  # what must not change when the run resumes
    save_tokenizer: Callable[[Path], object]  # writes the tokenizer's files into a folder that it makes
    micro_batch_size: int

    def throwaway_batch(self) -> MicroBatch:
        """A micro-batch of full shape with one document a row, for the pass before step 1."""
        rows, seq_len = self.micro_batch_size, self.source.seq_len
        ids = torch.zeros(rows, seq_len, dtype=torch.int64)
        cu_seqlens = None
        if self.source.reset_at_document_boundaries:
            cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * seq_len
        return MicroBatch(ids, ids.clone(), cu_seqlens, torch.full((rows,), -1))


def open_data(config: Config, model_config: LrnnConfig, ranks: Ranks) -> Data:
    """Open and check what `config.data` names.

    Raises:
        UserError: see `TokenCorpus`, `StreamData`, `check_model_matches_corpora`, `accumulation_steps` and
            `check_enough_samples`.
    """
    accumulation_steps(config.global_batch_size, config.micro_batch_size, ranks.world_size)
    d = config.data
    description: dict[str, Any] = {
        "seq_len": d.seq_len,
        "seed": config.seed,
        "reset_at_document_boundaries": d.reset_at_document_boundaries,
    }
    if d.stream is not None:
        return _open_stream(config, d.stream, model_config, description)
    corpora = [TokenCorpus(c.path) for c in d.corpora]
    check_model_matches_corpora(model_config.vocab_size, model_config.tokenizer_fingerprint, corpora)
    weights = [c.weight for c in d.corpora]
    source = CorpusData(corpora, weights, d.seq_len, config.seed, d.reset_at_document_boundaries)
    check_enough_samples(source, ranks.world_size)
    description |= {
        "tokenizer": corpora[0].tokenizer_fingerprint,
        "corpora": [c.fingerprint for c in corpora],
        "weights": weights,
    }
    tokenizer = Path(d.corpora[0].path) / "tokenizer"
    return Data(source, description, lambda folder: shutil.copytree(tokenizer, folder), config.micro_batch_size)


def _open_stream(config: Config, stream: StreamSource, model_config: LrnnConfig, description: dict[str, Any]) -> Data:
    tokenizer = load_tokenizer(stream.tokenizer)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise UserError(
            f"tokenizer {stream.tokenizer} has a vocabulary of {tokenizer.vocab_size}, the model's embedding only "
            f"vocab_size={model_config.vocab_size}; set vocab_size to at least {tokenizer.vocab_size}"
        )
    expected = model_config.tokenizer_fingerprint
    if expected not in (None, tokenizer.fingerprint):
        raise UserError(
            f"tokenizer {stream.tokenizer} (fingerprint {tokenizer.fingerprint[:12]}...) is another one than the "
            f"model's ({expected[:12]}...); give the model's tokenizer"
        )
    arguments = DatasetArguments(stream.path, stream.name, stream.data_files, stream.split, stream.text_column)
    d = config.data
    source = StreamData(
        arguments, tokenizer, d.seq_len, config.seed, stream.shuffle_buffer, d.reset_at_document_boundaries
    )
    description |= {"tokenizer": tokenizer.fingerprint, "stream": source.fingerprint}
    return Data(source, description, tokenizer.save, config.micro_batch_size)


def make_loader(data: Data, config: Config, ranks: Ranks, samples: int, stream: dict | None) -> Loader | StreamLoader:
    """The loader of this rank, from where the run stands: `samples` consumed, and the position of a stream."""
    sizes = (config.global_batch_size, config.micro_batch_size, ranks.rank, ranks.world_size)
    pin_memory = ranks.device.type == "cuda"
    if isinstance(data.source, StreamData):
        return StreamLoader(data.source, *sizes, state=stream, pin_memory=pin_memory)
    return Loader(data.source, *sizes, start_sample=samples, pin_memory=pin_memory)


class HeldOut:
    """The loss on the first windows of the corpora's held-out splits, in the loop."""

    def __init__(self, data: Data, config: Config, ranks: Ranks):
        self._every, self._steps, self._ranks = config.log.heldout_every, config.steps, ranks
        self._batches: list[MicroBatch] = []
        if self._every:
            if config.data.stream is not None:
                raise UserError("log.heldout_every needs corpora with a held-out split; a stream has none, set it to 0")
            corpora = [TokenCorpus(c.path, "heldout") for c in config.data.corpora]
            self._batches = list(
                heldout_batches(
                    corpora,
                    config.data.seq_len,
                    config.micro_batch_size,
                    config.log.heldout_batches,
                    ranks.rank,
                    ranks.world_size,
                    reset_at_document_boundaries=config.data.reset_at_document_boundaries,
                )
            )

    def due(self, step: int) -> bool:
        """Whether the loss is wanted after `step` steps: every so often, and at the end."""
        return bool(self._batches) and (step % self._every == 0 or step == self._steps)

    @torch.no_grad()
    def loss(self, engine: Any) -> float:
        """Mean cross-entropy in nats a token, over all ranks' batches."""
        device = self._ranks.device
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        engine.eval()
        for batch in self._batches:
            totals[0] += engine(**model_inputs(batch, device), num_items_in_batch=1).loss
            totals[1] += (batch.labels != -100).sum().to(device)
        engine.train()
        dist.all_reduce(totals)
        return float(totals[0] / totals[1])
