"""The samples of one forward pass, as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lrnn.kernels.reference.documents import note_longest

IGNORED = -100  # the label that the loss leaves out


@dataclass
class MicroBatch:
    """Samples of one forward pass.

    Attributes:
        input_ids: [B, L] int64.
        labels: [B, L] int64, the next token of each position; -100 where that token is the first of another document.
        cu_seqlens: [N + 1] int32, the positions in the flattened B * L tokens at which documents start, and B * L;
            the start of a row counts as one. None unless the state is reset at document boundaries.
        sample_indices: [B] int64, the samples' numbers in the run; -1 for a row that only fills up a batch.
        continues: [B] bool, whether a row begins with the state that the sample ahead of it left; None if no state is
            passed on. It stays on the CPU.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    sample_indices: Tensor
    continues: Tensor | None = None

    @property
    def num_labels(self) -> int:
        """Return the number of labels that the loss is taken over."""
        return int((self.labels != IGNORED).sum())

    def pin_memory(self) -> "MicroBatch":
        """Return a copy in page-locked memory, which can be copied to the GPU while the GPU computes."""
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.pin_memory()
        return MicroBatch(
            self.input_ids.pin_memory(),
            self.labels.pin_memory(),
            cu_seqlens,
            self.sample_indices.pin_memory(),
            self.continues,
        )


def model_inputs(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """Return a micro-batch as keyword arguments of the model, on `device`."""
    tensors = {"input_ids": batch.input_ids, "shift_labels": batch.labels}
    if batch.cu_seqlens is not None:
        tensors["cu_seqlens"] = batch.cu_seqlens
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    if batch.cu_seqlens is not None:
        note_longest(inputs["cu_seqlens"], int(batch.cu_seqlens.diff().max()))
    return inputs


def build_micro_batch(
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    seq_len: int,
    sample_indices: np.ndarray,
    reset_at_document_boundaries: bool,
) -> MicroBatch:
    """Make a micro-batch of rows.

    Args:
        rows: of each sample its tokens ([seq_len + 1], inputs and the last label) and the positions in them at which a
            document starts, ascending.
        seq_len: tokens per sample.
        sample_indices: [B] int64, the samples' numbers in the run.
        reset_at_document_boundaries: whether to set `cu_seqlens`.
    """
    input_ids = torch.empty(len(rows), seq_len, dtype=torch.int64)
    labels = torch.empty(len(rows), seq_len, dtype=torch.int64)
    inputs_np, labels_np = input_ids.numpy(), labels.numpy()
    boundaries: list[np.ndarray] = []
    for row, (tokens, starts) in enumerate(rows):
        inputs_np[row] = tokens[:-1]
        labels_np[row] = tokens[1:]
        inner = starts[starts.searchsorted(1) :]
        labels_np[row, inner - 1] = IGNORED
        if reset_at_document_boundaries:
            boundaries.append(np.array([row * seq_len]))
            boundaries.append(inner[: inner.searchsorted(seq_len)] + row * seq_len)
    cu_seqlens = None
    if reset_at_document_boundaries:
        boundaries.append(np.array([len(rows) * seq_len]))
        cu_seqlens = torch.from_numpy(np.concatenate(boundaries).astype(np.int32))
    return MicroBatch(input_ids, labels, cu_seqlens, torch.from_numpy(np.asarray(sample_indices, dtype=np.int64)))
