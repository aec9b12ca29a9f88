"""Functions that the kernels in plain Triton share: positions of chunks, rounding of step sizes, decays, stores."""

import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.constants import CHUNK, LEAST_KEPT, LEAST_KEPT_FP16, SMALL_BETA
from lrnn.kernels.common.tiles import Tiles
from lrnn.kernels.delta_rule.call import Call


@triton.jit
def chunk_position(i_c, cu_seqlens, chunk_table, T, STEPS: tl.constexpr, IS_VARLEN: tl.constexpr):
    # Return (sequence, chunk in it, its first row, its length) of the i_c-th chunk, where chunks have STEPS rows;
    # sequence -1 past the last chunk.
    if IS_VARLEN:
        i_n = tl.load(chunk_table + 2 * i_c)
        i_t = tl.load(chunk_table + 2 * i_c + 1)
        bos = tl.load(cu_seqlens + tl.maximum(i_n, 0)).to(tl.int32)
        length = tl.load(cu_seqlens + tl.maximum(i_n, 0) + 1).to(tl.int32) - bos
    else:
        n_chunks = tl.cdiv(T, STEPS)
        i_n = i_c // n_chunks
        i_t = i_c % n_chunks
        bos = i_n * T
        length = T
    return i_n, i_t, bos, length


@triton.jit
def sequence_position(i_n, cu_seqlens, chunk_starts, T, STEPS: tl.constexpr, IS_VARLEN: tl.constexpr):
    # Return (first row, length, number of its first chunk) of the i_n-th sequence, where chunks have STEPS rows.
    if IS_VARLEN:
        bos = tl.load(cu_seqlens + i_n).to(tl.int32)
        length = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - bos
        first_chunk = tl.load(chunk_starts + i_n).to(tl.int32)
    else:
        bos = i_n * T
        length = T
        first_chunk = i_n * tl.cdiv(T, STEPS)
    return bos, length, first_chunk


@triton.jit
def rows_left(length, i_t, STEPS: tl.constexpr, BT: tl.constexpr, IS_FULL: tl.constexpr):
    # Return how many rows of the tiles of a sequence's i_t-th chunk are the chunk's; maybe more where STEPS is BT.
    if IS_FULL:
        return BT
    left = length - i_t * STEPS
    if STEPS < BT:
        left = tl.minimum(left, STEPS)
    return left


@triton.jit
def store_result(to, value, row, column, width, m_t, IS_FULL: tl.constexpr):
    # Store value [rows, columns] to a matrix of `width` columns: by the TMA if all rows of a chunk exist
    # (`result_tiles`).
    if IS_FULL and value.dtype != tl.float32:
        to.store([row, column], value)
    else:
        o_r = tl.arange(0, value.shape[0])[:, None]
        o_c = tl.arange(0, value.shape[1])[None, :]
        tl.store(to + (row + o_r).to(tl.int64) * width + column + o_c, value, mask=m_t[:, None])


@triton.jit
def step_and_back(x, beta, dtype: tl.constexpr):
    # Return (beta x rounded to a dtype, x as it is recovered from that, what rows of both must be multiplied by), with
    # x [BV, BT] and beta [BT]. Rows for float16 are scaled so that their largest |x| is in [1, 2): float16 then holds
    # them to 11 bits, whatever their size. From a small beta nothing could be recovered: its x is kept as it is, and
    # adds too little for the rounding to matter.
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
    # Return whether dW is kept as it is instead of beta dW, the gradient of v: where the dtype would lose too much of
    # the latter for dW to be recovered. float16 has few exponents.
    if dtype == tl.float16:
        return beta < LEAST_KEPT_FP16
    else:
        return beta < LEAST_KEPT


@triton.jit
def query_steps(BQ: tl.constexpr, FACTORS: tl.constexpr):
    # Return the step of a chunk after which each of its queries reads.
    return tl.arange(0, BQ) * FACTORS + FACTORS - 1


@triton.jit
def at_queries(x, BQ: tl.constexpr, FACTORS: tl.constexpr):
    # Return those of a chunk's numbers x [BT] that belong to `query_steps`, and 0 past the last query.
    if FACTORS == 1:
        return x
    o_t = tl.arange(0, x.shape[0])
    return tl.sum(tl.where(query_steps(BQ, FACTORS)[:, None] == o_t[None, :], x[None, :], 0.0), 1)


@triton.jit
def decay_between(mask, g_q, g, log_q, log_k, PRECISION: tl.constexpr):
    # Return exp2(g_q_i - g_j + log_q_i + log_k_j) [BQ, BT] where the mask is true, else 0. The exponent is masked
    # because it would overflow above the diagonal. Norms join the gates first, which saves an addition for each
    # element. But large gates then take away the norms' last bits, which float32 needs.
    if PRECISION != "tf32":
        exponent = (g_q[:, None] - g[None, :]) + (log_q[:, None] + log_k[None, :])
    else:
        exponent = (g_q + log_q)[:, None] - (g - log_k)[None, :]
    return tl.exp2(tl.where(mask, exponent, float("-inf")))


def result_tiles(call: Call, matrix: Tensor | None, rows: int = CHUNK) -> Tensor | Tiles | None:
    """Return a result [rows, columns] or [B, T, H, D] in the form in which `store_result` takes it, with `rows` per
    chunk.

    These are its tiles, unless a chunk may have fewer rows than a tile, or the elements are float32, for which shared
    memory has no buffer left.
    """
    if matrix is None or not call.is_full or matrix.element_size() != 2:
        return matrix
    return Tiles(matrix, rows, call.columns)
