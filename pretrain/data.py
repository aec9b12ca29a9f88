"""The data of a run, from its configuration: corpora or a stream, the loader, and the held-out split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.pretrain.config import Config
from lrnn.pretrain.corpus import TokenCorpus, check_model_matches_corpora
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.loader import CorpusData, Loader, MicroBatch, accumulation_steps, heldout_batches


@dataclass
class Data:
    """What a run trains on. `description` is what must not change when it resumes."""

    source: CorpusData | Any
    description: dict[str, Any]
    tokenizer_dir: Path | None
    seq_len: int
    micro_batch_size: int

    def throwaway_batch(self) -> MicroBatch:
        """A micro-batch of full shape with one document a row, for the pass before step 1."""
        ids = torch.zeros(self.micro_batch_size, self.seq_len, dtype=torch.int64)
        starts = torch.arange(self.micro_batch_size + 1, dtype=torch.int32) * self.seq_len
        cu_seqlens = starts if self.source.reset_at_document_boundaries else None
        return MicroBatch(ids, ids.clone(), cu_seqlens, torch.full((self.micro_batch_size,), -1))


def open_data(config: Config, model_config: LrnnConfig, ranks: Ranks | None, processes: int = 1) -> Data:
    """Open and check what `config.data` names. Without `ranks` (before processes start) shards are checked by size alone.

    Raises:
        UserError: see `TokenCorpus`, `check_model_matches_corpora`, and a sequence too long for the data.
    """
    processes = ranks.world_size if ranks is not None else processes
    d = config.data
    expected = getattr(model_config, "tokenizer_fingerprint", None)
    if d.stream is not None:
        from lrnn.pretrain.stream import StreamData
        stream = StreamData(d.stream, d.seq_len, config.seed, d.reset_at_document_boundaries)
        if stream.tokenizer.vocab_size > model_config.vocab_size:
            raise UserError(
                f"tokenizer {d.stream.tokenizer} has a vocabulary of {stream.tokenizer.vocab_size}, the model's embedding "
                f"only vocab_size={model_config.vocab_size}"
            )
        description = {"stream": d.stream.model_dump(), "seq_len": d.seq_len, "seed": config.seed}
        return Data(stream, description, None, d.seq_len, config.micro_batch_size)
    # One process reads all checksums; the others look at the sizes.
    verify: Any = True if ranks is not None and ranks.is_main else "size"
    corpora = [TokenCorpus(c.path, verify=verify) for c in d.corpora]
    check_model_matches_corpora(model_config.vocab_size, expected, corpora)
    weights = [c.weight for c in d.corpora]
    source = CorpusData(corpora, weights, d.seq_len, config.seed, d.reset_at_document_boundaries)
    accumulation_steps(config.global_batch_size, config.micro_batch_size, processes)
    description = {
        "corpora": [c.fingerprint for c in corpora],
        "weights": weights,
        "tokenizer": corpora[0].tokenizer_fingerprint,
        "seq_len": d.seq_len,
        "seed": config.seed,
        "reset_at_document_boundaries": d.reset_at_document_boundaries,
    }
    return Data(source, description, Path(d.corpora[0].path) / "tokenizer", d.seq_len, config.micro_batch_size)


def make_loader(data: Data, config: Config, ranks: Ranks, progress: Any) -> Loader:
    """The loader of this rank, from the sample (or the state of the stream) where the run stands."""
    shape = {
        "global_batch_size": config.global_batch_size,
        "micro_batch_size": config.micro_batch_size,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "pin_memory": ranks.device.type == "cuda",
    }
    return Loader(data.source, start_sample=progress.samples, **shape)


class HeldOut:
    """The loss on the first windows of the corpora's held-out splits, in the loop."""

    def __init__(self, data: Data, config: Config, ranks: Ranks):
        self._every, self._steps, self._ranks = config.log.heldout_every, config.steps, ranks
        self._batches: list[MicroBatch] = []
        if self._every:
            if config.data.stream is not None:
                raise UserError("log.heldout_every needs corpora with a held-out split; a stream has none, set it to 0")
            corpora = [TokenCorpus(c.path, "heldout", verify=True if ranks.is_main else "size") for c in config.data.corpora]
            self._batches = list(heldout_batches(
                corpora,
                config.data.seq_len,
                config.micro_batch_size,
                config.log.heldout_batches,
                ranks.rank,
                ranks.world_size,
                reset_at_document_boundaries=config.data.reset_at_document_boundaries,
            ))

    def due(self, step: int) -> bool:
        """Whether the loss is wanted after `step` steps: every so often, and at the end."""
        return bool(self._batches) and (step % self._every == 0 or step == self._steps)

    @torch.no_grad()
    def loss(self, engine: Any) -> float:
        """Mean cross-entropy in nats a token, over all ranks' batches."""
        from lrnn.pretrain.train import model_inputs

        device = self._ranks.device
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        engine.eval()
        for batch in self._batches:
            totals[0] += engine(**model_inputs(batch, device), num_items_in_batch=1).loss
            totals[1] += (batch.labels != -100).sum().to(device)
        engine.train()
        dist.all_reduce(totals)
        return float(totals[0] / totals[1])
