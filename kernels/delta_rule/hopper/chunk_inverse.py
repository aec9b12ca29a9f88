"""`chunk_inverse` for Hopper, in Gluon: the same matrices from programs of half the registers, which wait less.

As in `chunk_inverse`, a program is one warp and computes one chunk of one value head. Twelve programs instead of eight
fit on a multiprocessor. The TMA loads K while the gates are computed. The diagonal blocks M_II reach the lanes that
need them through shared memory, not global memory, and C_II is written when all of M_II has been read. Below the
diagonal everything is kept transposed: the result of one product is then in the registers in which the next product
takes its left operand, and M_IL is where a product takes M_IL^T as its right operand. With B = diag(beta), for blocks
J < I:

    X_IJ^T = (1 - C_JJ^T B_J) M_IJ^T - sum_{J < L < I} (C_LJ^T B_L) M_IL^T
    C_IJ^T = X_IJ^T - (X_IJ^T B_I) C_II^T

Every operand is a sum of two numbers of C's dtype. Equations and arguments are those of `chunk_inverse`. That kernel
remains the readable form, and runs all calls that this one is not made for (`Hopper.fits`).
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from lrnn.kernels.common.launch import launch
from lrnn.kernels.delta_rule.call import Call, Operands
from lrnn.kernels.delta_rule.hopper.parts import (
    FLAT,
    Buffer,
    aggregate,
    part_barrier,
    reinterpret,
    tma_load,
    tma_store,
)

HOPPER_INVERSE_LAUNCH = {"num_warps": 1}

_MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))  # of a block of 16 x 16, one warp
_LEFT = gl.constexpr(gl.DotOperandLayout(0, _MMA.value, 2))
_RIGHT = gl.constexpr(gl.DotOperandLayout(1, _MMA.value, 2))
_BY_ROW = gl.constexpr(gl.SliceLayout(1, _MMA.value))
_BY_COLUMN = gl.constexpr(gl.SliceLayout(0, _MMA.value))
_TOKENS = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))  # of the numbers of a chunk's tokens
_BLOCKS = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [1, 1], [1, 0]))  # of a row of the four diagonal blocks
_FLAT_2D = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_FLAT_3D = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@aggregate
class Tokens:
    """Numbers of a chunk's tokens in shared memory, as float32 [BT]."""

    gates: Buffer  # log2, accumulated over the chunk
    beta: Buffer
    log_r: Buffer  # log2 of 1/|k|

    @gluon.jit
    def beta_of(self, I: gl.constexpr):
        # of the columns of block I
        return self.beta.slice(16 * I, 16).load(_BY_COLUMN)[None, :]


@aggregate
class Split:
    """A block as the sum of two numbers of a dtype for each element, as an operand of products."""

    high: gl.tensor
    low: gl.tensor


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _log_gates(gate, A_log, dt_bias, row, i_h, HV: gl.constexpr, FACTORS: gl.constexpr, GATE: gl.constexpr):
    # log-gates (base 2); 0 after a token's first step
    if GATE == "none":
        return gl.zeros([64], gl.float32, _TOKENS)
    else:
        b_g = gl.load(gate + row // FACTORS * HV + i_h).to(gl.float32)
        if GATE == "raw":
            b_a = b_g + gl.load(dt_bias + i_h).to(gl.float32)
            softplus = gl.maximum(b_a, 0.0) + gl.log(1.0 + gl.exp(-gl.abs(b_a)))
            b_g = -gl.exp(gl.load(A_log + i_h).to(gl.float32)) * softplus
        if FACTORS > 1:
            b_g = gl.where(row % FACTORS == 0, b_g, 0.0)
        return b_g * 1.4426950408889634


@gluon.jit
def _log_norm(kk, NORMALIZE: gl.constexpr):
    # log2 of the inverse norms of a block's keys, which are on the diagonal of K_I K_I^T
    if NORMALIZE:
        on_diagonal = gl.arange(0, 16, _BY_ROW)[:, None] == gl.arange(0, 16, _BY_COLUMN)[None, :]
        square = gl.sum(gl.where(on_diagonal, kk, 0.0), 1)
        return -0.5 * gl.log2(gl.maximum(square, 1e-12))
    else:
        return gl.zeros([16], gl.float32, _BY_ROW)


@gluon.jit
def _coupling_inside(kk, tokens, I: gl.constexpr):
    # M_II. The gates above the diagonal would overflow, so the exponent is masked, not the product.
    below = gl.arange(0, 16, _BY_ROW)[:, None] > gl.arange(0, 16, _BY_COLUMN)[None, :]
    g, r = tokens.gates.slice(16 * I, 16), tokens.log_r.slice(16 * I, 16)
    to_row = g.load(_BY_ROW) + r.load(_BY_ROW)
    from_column = g.load(_BY_COLUMN) - r.load(_BY_COLUMN)
    return kk * gl.exp2(gl.where(below, to_row[:, None] - from_column[None, :], float("-inf")))


@gluon.jit
def _to_row(tokens, I: gl.constexpr):
    # gates and norms of block I's rows, from the last token before it
    before = tokens.gates.slice(16 * I - 1, 1).load(_BY_ROW)
    g, r = tokens.gates.slice(16 * I, 16), tokens.log_r.slice(16 * I, 16)
    return gl.exp2(g.load(_BY_ROW) - before + r.load(_BY_ROW))


@gluon.jit
def _coupling(kk, to_row, tokens, I: gl.constexpr, J: gl.constexpr, dtype: gl.constexpr):
    # M_IJ^T for I > J as a right operand. Cut at the last token before block I, no factor of the gates exceeds 1.
    before = tokens.gates.slice(16 * I - 1, 1).load(_BY_COLUMN)
    g, r = tokens.gates.slice(16 * J, 16), tokens.log_r.slice(16 * J, 16)
    to_column = gl.exp2(before - g.load(_BY_COLUMN) + r.load(_BY_COLUMN))
    return _right(kk * to_row[:, None] * to_column[None, :], dtype)


@gluon.jit
def _left(x, dtype: gl.constexpr):
    # x as left operands
    high = x.to(dtype)
    low = (x - high.to(gl.float32)).to(dtype)
    return Split(gl.convert_layout(high, _LEFT), gl.convert_layout(low, _LEFT))


@gluon.jit
def _right(x, dtype: gl.constexpr):
    # x^T as right operands
    high = x.to(dtype)
    low = (x - high.to(gl.float32)).to(dtype)
    high, low = gl.permute(high, (1, 0)), gl.permute(low, (1, 0))
    return Split(gl.convert_layout(high, _RIGHT), gl.convert_layout(low, _RIGHT))


@gluon.jit
def _add_product(a, b, acc):
    # acc + a b, without the product of the low parts
    return mma_v2(a.high, b.high, mma_v2(a.high, b.low, mma_v2(a.low, b.high, acc)))


@gluon.jit
def _diagonal(c_s, I: gl.constexpr):
    # M_II or C_II, of the four blocks that lie side by side
    return c_s.slice(16 * I, 16, 1)


@gluon.jit
def _first(c_s, tokens, J: gl.constexpr, dtype: gl.constexpr):
    # 1 - C_JJ^T B_J
    on_diagonal = gl.arange(0, 16, _BY_ROW)[:, None] == gl.arange(0, 16, _BY_COLUMN)[None, :]
    c = _diagonal(c_s, J).permute((1, 0)).load(_MMA)
    return _left(gl.where(on_diagonal, 1.0, 0.0) - c * tokens.beta_of(J), dtype)


@gluon.jit
def _close(x, c_s, tokens, I: gl.constexpr, dtype: gl.constexpr):
    # C_IJ^T = X_IJ^T - (X_IJ^T B_I) C_II^T
    return _add_product(_left(-x * tokens.beta_of(I), dtype), _right(_diagonal(c_s, I).load(_MMA), dtype), x)


@gluon.jit
def _store_block(tile, c, I: gl.constexpr, J: gl.constexpr):
    tile.slice(16 * I, 16, 0).slice(16 * J, 16, 1).permute((1, 0)).store(c.to(tile.dtype))


@gluon.jit
def _join_halves(x):
    # the first half of a tuple of tensors joined with the second one
    half: gl.constexpr = len(x) // 2
    joined = ()
    for i in gl.static_range(half):
        joined = joined + (gl.join(x[i], x[i + half]),)  # type: ignore[assignment]  # noqa: RUF005
    return joined


@gluon.jit
def _substitute(m_s, c_s, tokens):
    # C_i = M_i - sum_{l < i} M_il beta_l C_l, in the four diagonal blocks side by side. A lane holds two columns of one
    # block, and of M it needs a number for each row before.
    m = reinterpret(m_s, gl.float32, [16, 4, 16], _FLAT_2D)
    beta = reinterpret(tokens.beta, gl.float32, [4, 16], _FLAT_2D)
    rows = ()
    scaled = ()
    for i in gl.static_range(16):
        m_i = m.index(i)
        c_i = m_i.load(_BLOCKS)
        for j in gl.static_range(i):
            c_i -= m_i.slice(j, 1, 1).load(_BLOCKS) * scaled[j]
        rows = rows + (c_i,)  # type: ignore[assignment]  # noqa: RUF005
        scaled = scaled + (c_i * beta.slice(i, 1, 1).load(_BLOCKS),)  # type: ignore[assignment]  # noqa: RUF005
    # All is stored late, because the loads of M would have to wait for a store before them, which might be to the same
    # place. It is stored at once, because Triton 3.6 sets barriers between stores to the same buffer.
    for _ in gl.static_range(4):
        rows = _join_halves(rows)
    together = gl.permute(rows[0], (2, 3, 4, 5, 0, 1)).reshape([16, 4, 16])  # type: ignore[misc]
    reinterpret(c_s, gl.float32, [16, 4, 16], _FLAT_3D).store(together)


@gluon.jit
def _key_products(k_s, K: gl.constexpr):
    # K_I K_J^T of the blocks of 16 tokens, a slice of the keys at a time
    m00 = gl.zeros([16, 16], gl.float32, _MMA)
    m10, m11, m20, m21, m22, m30, m31, m32, m33 = m00, m00, m00, m00, m00, m00, m00, m00, m00
    for i_k in gl.static_range(0, K, 16):
        part = k_s.slice(i_k, 16, 1)
        a0, a1 = part.slice(0, 16).load(_LEFT), part.slice(16, 16).load(_LEFT)
        a2, a3 = part.slice(32, 16).load(_LEFT), part.slice(48, 16).load(_LEFT)
        b0, b1 = part.slice(0, 16).permute((1, 0)).load(_RIGHT), part.slice(16, 16).permute((1, 0)).load(_RIGHT)
        b2, b3 = part.slice(32, 16).permute((1, 0)).load(_RIGHT), part.slice(48, 16).permute((1, 0)).load(_RIGHT)
        m00, m11, m22, m33 = mma_v2(a0, b0, m00), mma_v2(a1, b1, m11), mma_v2(a2, b2, m22), mma_v2(a3, b3, m33)
        m10, m20, m30 = mma_v2(a1, b0, m10), mma_v2(a2, b0, m20), mma_v2(a3, b0, m30)
        m21, m31, m32 = mma_v2(a2, b1, m21), mma_v2(a3, b1, m31), mma_v2(a3, b2, m32)
    return m00, m10, m11, m20, m21, m22, m30, m31, m32, m33


@gluon.jit
def _store_diagonal(tile, c_s, zero):
    # the diagonal blocks, and zeros above them
    for I in gl.static_range(4):
        for J in gl.static_range(I + 1, 4):
            _store_block(tile, zero, I, J)
        tile.slice(16 * I, 16, 0).slice(16 * I, 16, 1).store(_diagonal(c_s, I).load(_MMA).to(tile.dtype))


@gluon.jit(do_not_specialize=["R", "beta_range"])
def chunk_inverse_hopper_kernel(
    k, gate, beta, A_log, dt_bias, c_out, vectors, R, beta_range, H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr,
    BT: gl.constexpr, FACTORS: gl.constexpr, GATE: gl.constexpr, RAW_BETA: gl.constexpr, NORMALIZE: gl.constexpr,
):  # fmt: skip
    # The heads of a chunk are computed side by side: their numbers are neighbours in memory, so they are read and
    # written together.
    i_h = gl.program_id(0) % HV
    i_c = gl.program_id(0) // HV
    first = i_c * BT
    k_s = gl.allocate_shared_memory(k.dtype, [BT, K], k.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded, count=1)
    fence_async_shared()
    part_barrier()
    mbarrier.expect(loaded, k.block_type.nbytes)
    tma_load(k, [first, i_h // (HV // H) * K], loaded, k_s)

    # step sizes, and log-gates accumulated over the chunk
    t = gl.arange(0, BT, _TOKENS)
    row = (first + t).to(gl.int64)
    b_beta = gl.load(beta + row * HV + i_h).to(gl.float32)
    if RAW_BETA:
        b_beta = beta_range / (1.0 + gl.exp(-b_beta))
    g = gl.associative_scan(_log_gates(gate, A_log, dt_bias, row, i_h, HV, FACTORS, GATE), 0, _add)
    p_g = vectors + 4 * i_h.to(gl.int64) * R + first
    gl.store(p_g + t, g)
    gl.store(p_g + R + t, b_beta)
    if not NORMALIZE:  # otherwise `chunk_forward` writes it
        gl.store(p_g + 3 * R.to(gl.int64) + t, gl.zeros([BT], gl.float32, _TOKENS))
    tokens = Tokens(
        gl.allocate_shared_memory(gl.float32, [BT], FLAT),
        gl.allocate_shared_memory(gl.float32, [BT], FLAT),
        gl.allocate_shared_memory(gl.float32, [BT], FLAT),
    )
    tokens.gates.store(g)
    tokens.beta.store(b_beta)

    mbarrier.wait(loaded, 0)
    m00, m10, m11, m20, m21, m22, m30, m31, m32, m33 = _key_products(k_s, K)
    mbarrier.invalidate(loaded)

    tokens.log_r.slice(0, 16).store(_log_norm(m00, NORMALIZE))
    tokens.log_r.slice(16, 16).store(_log_norm(m11, NORMALIZE))
    tokens.log_r.slice(32, 16).store(_log_norm(m22, NORMALIZE))
    tokens.log_r.slice(48, 16).store(_log_norm(m33, NORMALIZE))
    m_s = gl.allocate_shared_memory(gl.float32, [16, BT], _FLAT_2D)  # where K was
    c_s = gl.allocate_shared_memory(gl.float32, [16, BT], _FLAT_2D)
    gl.store(p_g + 2 * R.to(gl.int64) + t, tokens.log_r.load(_TOKENS))
    _diagonal(m_s, 0).store(_coupling_inside(m00, tokens, 0))
    _diagonal(m_s, 1).store(_coupling_inside(m11, tokens, 1))
    _diagonal(m_s, 2).store(_coupling_inside(m22, tokens, 2))
    _diagonal(m_s, 3).store(_coupling_inside(m33, tokens, 3))
    _substitute(m_s, c_s, tokens)

    dtype: gl.constexpr = c_out.dtype
    to_1, to_2, to_3 = _to_row(tokens, 1), _to_row(tokens, 2), _to_row(tokens, 3)
    n10 = _coupling(m10, to_1, tokens, 1, 0, dtype)
    n20 = _coupling(m20, to_2, tokens, 2, 0, dtype)
    n30 = _coupling(m30, to_3, tokens, 3, 0, dtype)
    n21 = _coupling(m21, to_2, tokens, 2, 1, dtype)
    n31 = _coupling(m31, to_3, tokens, 3, 1, dtype)
    n32 = _coupling(m32, to_3, tokens, 3, 2, dtype)

    # the columns of blocks, each from its diagonal down
    zero = gl.zeros([16, 16], gl.float32, _MMA)
    first0, first1 = _first(c_s, tokens, 0, dtype), _first(c_s, tokens, 1, dtype)
    c10 = _close(_add_product(first0, n10, zero), c_s, tokens, 1, dtype)
    c21 = _close(_add_product(first1, n21, zero), c_s, tokens, 2, dtype)
    c32 = _close(_add_product(_first(c_s, tokens, 2, dtype), n32, zero), c_s, tokens, 3, dtype)
    s10 = _left(-c10 * tokens.beta_of(1), dtype)
    s21 = _left(-c21 * tokens.beta_of(2), dtype)
    c20 = _close(_add_product(s10, n21, _add_product(first0, n20, zero)), c_s, tokens, 2, dtype)
    c31 = _close(_add_product(s21, n32, _add_product(first1, n31, zero)), c_s, tokens, 3, dtype)
    s20 = _left(-c20 * tokens.beta_of(2), dtype)
    c30 = _add_product(s20, n32, _add_product(s10, n31, _add_product(first0, n30, zero)))
    c30 = _close(c30, c_s, tokens, 3, dtype)

    tile = gl.allocate_shared_memory(dtype, [BT, BT], c_out.layout)
    _store_diagonal(tile, c_s, zero)
    _store_block(tile, c10, 1, 0)
    _store_block(tile, c20, 2, 0)
    _store_block(tile, c21, 2, 1)
    _store_block(tile, c30, 3, 0)
    _store_block(tile, c31, 3, 1)
    _store_block(tile, c32, 3, 2)
    fence_async_shared()
    part_barrier()
    tma_store(c_out, [first, i_h * BT], tile)
    tma.store_wait(0)


def launch_chunk_inverse(
    call: Call, operands: Operands, gate: Tensor | None, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None
) -> None:
    """Launch the kernel, as `Backend.chunk_inverse` says."""
    launch(
        chunk_inverse_hopper_kernel,
        (call.chunks.count * call.HV, 1, 1),
        operands.k,
        None if gate is None else gate.contiguous(),
        beta.contiguous(),
        A_log,
        dt_bias,
        operands.c,
        operands.vectors,
        call.R,
        call.beta_range or 0.0,
        NORMALIZE=call.normalize_qk,
        FACTORS=call.factors,
        GATE=call.gate,
        RAW_BETA=call.beta_range is not None,
        **HOPPER_INVERSE_LAUNCH,
        **call.sizes,
    )
