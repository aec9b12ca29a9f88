"""What the chunkwise kernels share: the chunk length, where a chunk or a sequence lies, tiles for the TMA."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run on CPU tensors, for tests
CHUNK = 64  # tokens of a chunk: one Hopper warpgroup's rows, and 64 x 64 is solved per chunk

SMALL_BETA = tl.constexpr(1e-4)  # below it x is not recovered from beta x (`step_and_back`)
# below these dW is kept for the backward pass inside chunks, from there on beta dW (`is_kept_small`)
LEAST_KEPT, LEAST_KEPT_FP16 = tl.constexpr(1e-20), tl.constexpr(0.0625)


@triton.jit
def chunk_position(i_c, cu_seqlens, chunk_table, T, BT: tl.constexpr, IS_VARLEN: tl.constexpr):
    # (sequence, chunk in it, its first row, its length) of the i_c-th chunk; sequence -1 past the last chunk
    if IS_VARLEN:
        i_n = tl.load(chunk_table + 2 * i_c)
        i_t = tl.load(chunk_table + 2 * i_c + 1)
        bos = tl.load(cu_seqlens + tl.maximum(i_n, 0)).to(tl.int32)
        length = tl.load(cu_seqlens + tl.maximum(i_n, 0) + 1).to(tl.int32) - bos
    else:
        n_chunks = tl.cdiv(T, BT)
        i_n = i_c // n_chunks
        i_t = i_c % n_chunks
        bos = i_n * T
        length = T
    return i_n, i_t, bos, length


@triton.jit
def sequence_position(i_n, cu_seqlens, chunk_starts, T, BT: tl.constexpr, IS_VARLEN: tl.constexpr):
    # (first row, length, number of its first chunk) of the i_n-th sequence
    if IS_VARLEN:
        bos = tl.load(cu_seqlens + i_n).to(tl.int32)
        length = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - bos
        first_chunk = tl.load(chunk_starts + i_n).to(tl.int32)
    else:
        bos = i_n * T
        length = T
        first_chunk = i_n * tl.cdiv(T, BT)
    return bos, length, first_chunk


@triton.jit
def store_result(to, value, row, column, width, m_t, IS_FULL: tl.constexpr):
    # value [rows, columns] to a matrix of `width` columns: by the TMA where all rows of a chunk exist (`result_tiles`)
    if IS_FULL and value.dtype != tl.float32:
        to.store([row, column], value)
    else:
        o_r = tl.arange(0, value.shape[0])[:, None]
        o_c = tl.arange(0, value.shape[1])[None, :]
        tl.store(to + (row + o_r).to(tl.int64) * width + column + o_c, value, mask=m_t[:, None])


@triton.jit
def step_and_back(x, beta, dtype: tl.constexpr):
    # (beta x rounded to a dtype, x as it is recovered from that, what rows of both are to be multiplied by), with x
    # [BV, BT] and beta [BT]. Rows for float16 are scaled so that their largest |x| lies in [1, 2): it then holds them
    # to 11 bits, whatever their size. From a small beta nothing could be recovered: its x is kept as it is, and adds
    # too little for the rounding to matter.
    down = tl.full([x.shape[0]], 1.0, tl.float32)
    if dtype == tl.float16:
        exponent = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000
        x = x * (0x7F000000 - exponent).to(tl.float32, bitcast=True)[:, None]
        down = exponent.to(tl.float32, bitcast=True)
    stepped = (x * beta[None, :]).to(dtype)
    is_small = beta < SMALL_BETA
    inverse = tl.where(is_small, 0.0, 1.0 / beta)
    return stepped, tl.where(is_small[None, :], x, stepped.to(tl.float32) * inverse[None, :]), down


@triton.jit
def is_kept_small(beta, dtype: tl.constexpr):
    # Whether dW is kept as it is instead of beta dW, the gradient of v: where the dtype would lose too much of the
    # latter to be rid of beta again. float16 has few exponents.
    if dtype == tl.float16:
        return beta < LEAST_KEPT_FP16
    else:
        return beta < LEAST_KEPT


@triton.jit
def decay_between(mask, g, log_q, log_k, PRECISION: tl.constexpr):
    # [BT, BT]: exp2(g_i - g_j + log_q_i + log_k_j) where the mask is true, else 0. The exponent is masked, since above
    # the diagonal it would overflow. Norms join the gates first, which saves an addition for each element; but then
    # large gates take away the norms' last bits, of which float32 has use.
    if PRECISION == "tf32x3":
        exponent = (g[:, None] - g[None, :]) + (log_q[:, None] + log_k[None, :])
    else:
        exponent = (g + log_q)[:, None] - (g - log_k)[None, :]
    return tl.exp2(tl.where(mask, exponent, float("-inf")))


def matrix_dtype(dtype: torch.dtype, normalize: bool) -> torch.dtype:
    """dtype of the matrices C. With unit keys |C_ij| <= 1, of which float16 keeps three bits more than bfloat16."""
    return torch.float16 if normalize and dtype == torch.bfloat16 else dtype


def count_chunks(batch_size: int, seq_len: int, cu_seqlens: Tensor | None) -> int:
    """Chunks of a batch; with documents an upper bound, which takes no look at the GPU."""
    if cu_seqlens is None:
        return batch_size * -(-seq_len // CHUNK)
    return -(-batch_size * seq_len // CHUNK) + cu_seqlens.shape[0] - 1


def use_kernels(x: Tensor) -> bool:
    """Whether work on x is done by Triton kernels."""
    return x.is_cuda or INTERPRETED


class Chunks:
    """The chunks of a batch: of B sequences of T tokens, or of the documents that `cu_seqlens` bounds.

    No value is read back from the GPU: with documents, `count` is an upper bound and the table marks unused places.
    """

    def __init__(self, batch_size: int, seq_len: int, cu_seqlens: Tensor | None):
        self.seq_len = seq_len
        self.starts: Tensor | None = None  # int32 [N], number of each document's first chunk
        self.table: Tensor | None = None  # int32 [count, 2], document and chunk in it, or -1
        self.count = count_chunks(batch_size, seq_len, cu_seqlens)
        if cu_seqlens is None:
            self.sequences = batch_size
        else:
            self.sequences = cu_seqlens.numel() - 1
            ends = ((cu_seqlens.diff() + CHUNK - 1) // CHUNK).cumsum(0)
            number = torch.arange(self.count, device=cu_seqlens.device)
            document = torch.searchsorted(ends, number, right=True)
            starts = torch.cat([ends.new_zeros(1), ends])
            within = number - starts[document.clamp(max=self.sequences - 1)]
            self.starts = starts[:-1].int()
            self.table = torch.stack([torch.where(document < self.sequences, document, -1), within], 1).int()


def with_rows(x: Tensor) -> Tensor:
    """x [B, T, H, D], or a copy where its strides are such that no matrix [B * T, H * D] lies there for the TMA.

    The TMA wants rows of contiguous elements that start at multiples of 16 bytes.
    """
    B, T, H, D = x.shape
    by_sequence, by_token, by_head, by_element = x.stride()
    packed = by_element == 1 and (H == 1 or by_head == D) and (B == 1 or by_sequence == T * by_token)
    if not packed or by_token < H * D or by_token * x.element_size() % 16 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


class Tiles(TensorDescriptor):
    """Tiles [rows, columns] of a matrix, for loads and stores by the TMA.

    The matrix is a new one, or [B * T, H * D] of what `with_rows` returns. Triton's own constructor would look again
    whether the TMA can read it, which takes longer than all the rest of it.
    """

    def __init__(self, x: Tensor, rows: int, columns: int):
        self.base = x
        self.shape: tuple[int, ...] = x.shape
        self.strides: tuple[int, ...] = x.stride()
        if x.ndim == 4:
            B, T, H, D = self.shape
            self.shape, self.strides = (B * T, H * D), (self.strides[1], 1)
        self.block_shape = [rows, columns]
        self.kind = (x.dtype, rows, columns)  # what a compiled kernel depends on


class GluonTiles(GluonTensorDescriptor):
    """What a kernel in Gluon is compiled for, which wants to know how tiles lie in shared memory: rows swizzled by 128
    bytes, as the tensor cores read them, or a single row as it is. Compiled, it takes the `Tiles` themselves."""

    def __init__(self, tiles: Tiles):
        self.base, self.shape, self.strides = tiles.base, tiles.shape, tiles.strides
        self.block_shape = tiles.block_shape
        self.layout = NVMMASharedLayout(128 if tiles.block_shape[0] >= 8 else 0, tiles.base.element_size() * 8, rank=2)


def result_tiles(matrix: Tensor | None, rows: int, columns: int, is_full: bool) -> "Tensor | Tiles | None":
    """A matrix, or [B, T, H, D], for `store_result`: its tiles, unless a chunk may have fewer rows than a tile, or the
    elements are float32, for which shared memory has no buffer left."""
    return Tiles(matrix, rows, columns) if is_full and matrix is not None and matrix.element_size() == 2 else matrix


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of products: three tf32 products where operands are float32, else none is needed."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
