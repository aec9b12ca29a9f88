"""One call of the gated delta rule: its description, and its tensors as kernels read them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lrnn.kernels.common.architecture import architecture
from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.tiles import Tiles, with_rows
from lrnn.kernels.delta_rule.cut import Chunks, chunk_steps, count_chunks, count_segments, query_rows
from lrnn.kernels.delta_rule.settings import Settings, choose_settings


@dataclass(kw_only=True)
class Call:
    """The description of a call. It determines the backend and the settings of launches.

    A token has `factors` steps of the rule, each with its key, value and step size. The gate acts on the first step,
    and the query reads after the last.

    Attributes:
        B, T, H, HV, K, V: sizes, with T steps per sequence; k is [B, T, H, K], v is [B, T, HV, V].
        factors: steps per token; q is [B, T / factors, H, K], and the gate [B, T / factors, HV].
        dtype, device: of q, k and v.
        gate: "none", "log" if log-gates are given, or "raw" if they are computed with A_log and dt_bias.
        beta_range: step sizes are beta_range sigmoid(beta); None if beta are the step sizes.
        scale: factor on the output.
        normalize_qk: whether q and k are divided by their norms.
        cu_seqlens: boundaries of documents [N + 1] in steps, or None.
        split: whether each value that enters the states is a sum of two numbers of 16 bits.
    """

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    dtype: torch.dtype
    device: torch.device
    gate: str
    beta_range: float | None
    scale: float
    normalize_qk: bool
    cu_seqlens: Tensor | None
    split: bool
    factors: int = 1

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        A_log: Tensor | None,
        beta_range: float | None,
        scale: float,
        normalize_qk: bool,
        cu_seqlens: Tensor | None,
        precision: str = "standard",
    ) -> "Call":
        """Describe the call that gives these tensors and options to an operator."""
        B, T, H, K = k.shape
        return cls(
            B=B,
            T=T,
            H=H,
            HV=v.shape[2],
            K=K,
            V=v.shape[3],
            factors=T // q.shape[1],
            dtype=v.dtype,
            device=v.device,
            gate="none" if gate is None else "log" if A_log is None else "raw",
            beta_range=beta_range,
            scale=scale,
            normalize_qk=normalize_qk,
            cu_seqlens=cu_seqlens,
            split=precision == "split" and v.dtype != torch.float32,  # tf32x3 splits float32 operands already
        )

    @property
    def states(self) -> int:
        """Number of initial and final states: sequences, or documents."""
        return self.B if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def tokens(self) -> int:
        """Number of tokens per sequence."""
        return self.T // self.factors

    @property
    def steps(self) -> int:
        """Number of steps per chunk. A chunk has whole tokens."""
        return chunk_steps(self.factors)

    @property
    def query_rows(self) -> int:
        """Number of rows of a tile of queries, or of outputs."""
        return query_rows(self.factors)

    @cached_property
    def settings(self) -> Settings:
        """The settings of the kernels in plain Triton for this call and its GPU."""
        K = int(self.K)  # a trace with dynamic shapes has a symbol, which no cache takes
        return choose_settings(K, self.dtype, architecture(self.device))

    @cached_property
    def segments(self) -> int:
        """Number of segments that each sequence is cut into.

        Documents are not cut, nor are chunks with unused rows, nor is anything on some GPUs.
        """
        if self.cu_seqlens is not None or self.steps != CHUNK or not self.settings.cuts_sequences:
            return 1
        return count_segments(self.B, self.T, self.HV, self.K, self.V, self.dtype)

    @cached_property
    def chunks(self) -> Chunks:
        """The chunks of all sequences that are scanned: of B times `segments`, or of documents.

        Segments end where chunks end, so the cut changes the number of sequences and no chunk.
        """
        return Chunks(self.B * self.segments, self.T // self.segments, self.cu_seqlens, self.steps)

    @cached_property
    def R(self) -> int:
        """Places in a row of `Operands.vectors`: CHUNK for each chunk."""
        return CHUNK * count_chunks(self.B, self.T, self.cu_seqlens, self.steps)

    @property
    def is_full(self) -> bool:
        """Whether every chunk fills its tiles: then nothing is masked, and the TMA may store."""
        return self.cu_seqlens is None and self.T % CHUNK == 0 and self.query_rows * self.factors == CHUNK

    @property
    def contracts(self) -> bool:
        """Whether every factor of a transition is known to be a contraction: unit keys, step sizes in [0, 2]."""
        return self.normalize_qk and self.beta_range is not None

    @property
    def columns(self) -> int:
        """Columns of a tile of values."""
        return self.settings.forward_scan.BV

    @property
    def sizes(self) -> dict[str, int]:
        """The constants of every kernel that reads keys."""
        return {"H": self.H, "HV": self.HV, "K": self.K, "BT": CHUNK}

    @property
    def flags(self) -> dict[str, bool | str]:
        """The constants of every kernel in plain Triton that reads keys."""
        return {
            "NORMALIZE": self.normalize_qk,
            "IS_VARLEN": self.cu_seqlens is not None,
            "IS_FULL": self.is_full,
            "PRECISION": self.settings.precision,
        }

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a new tensor on the call's device."""
        return torch.empty(shape, dtype=dtype, device=self.device)


class Operands:
    """The tensors of a call as kernels read them.

    Attributes:
        queries, keys: q [B, T / factors, H, K] and k [B, T, H, K], with rows that the TMA can read.
        q: tiles [`Call.query_rows`, K].
        k: tiles [CHUNK, K].
        v: tiles [CHUNK, `Call.columns`].
        c: tiles [CHUNK, CHUNK] of the matrices [B * T, HV * CHUNK], in `matrix_dtype`.
        vectors: float32 [4 * HV, R]. The rows of a head are the log-gates (base 2) accumulated over a chunk, the step
            sizes, log2 of 1/|k|, and log2 of 1/|q| at the step where the backend has a token's query.
        vector_rows: their tiles [1, CHUNK].
    """

    def __init__(self, call: Call, q: Tensor, k: Tensor, v: Tensor, c: Tensor, vectors: Tensor):
        self.queries, self.keys = with_rows(q), with_rows(k)
        self.q, self.k = Tiles(self.queries, call.query_rows, call.K), Tiles(self.keys, CHUNK, call.K)
        self.v = Tiles(with_rows(v), CHUNK, call.columns)
        self.c = Tiles(c, CHUNK, CHUNK)
        self.vectors, self.vector_rows = vectors, Tiles(vectors, 1, CHUNK)


def can_save_states(K: int, dtype: torch.dtype) -> bool:
    """Return whether the forward scan may save the states and write the output in one pass.

    With longer keys, both would exceed the shared memory in some versions of Triton.
    """
    return K * dtype.itemsize <= 256
