"""Compute for each chunk of 64 tokens its gates, step sizes and key norms, and the matrix that turns the recurrence
into products.

With unit keys k^_i = r_i k_i (r_i = 1/|k_i|, or 1 where keys are used as given), the log-gate g_i accumulated inside
the chunk and G_ij = exp(g_i - g_j), the chunk's tokens are coupled by

    M = tril(G . K^ K^^T, -1)          C = M (I + diag(beta) M)^-1          (strictly lower, |C_ij| <= 1 for unit keys)

Then (I + diag(beta) M)^-1 = I - diag(beta) C: the identity and beta stay in float32 outside of C, which alone is
rounded. This is the WY form of arXiv 2406.06484, section 3.2; the gate commutes with the inverse (arXiv 2412.06464,
section 3.3).

C is found by forward substitution in float32 in the diagonal blocks of 16. These are then merged by products whose
operands are sums of two numbers of C's dtype (tf32x3 in float32). A power series for the inverse would lose all
accuracy for nearly parallel keys at beta near 2.
"""

import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.launch import launch
from lrnn.kernels.delta_rule.call import Call, Operands
from lrnn.kernels.delta_rule.portable.parts import chunk_position, rows_left

INVERSE_LAUNCH = {"num_warps": 1, "num_stages": 3}  # the blocks of 16 x 16 are one warp's work


@triton.jit
def _log_gates(gate, A_log, dt_bias, row, m, i_h, HV: tl.constexpr, FACTORS: tl.constexpr, GATE: tl.constexpr):
    # Return the log-gates (base 2) of some steps; 0, which is no decay, where m is false and after a token's first
    # step.
    b_g = tl.zeros([row.shape[0]], tl.float32)
    if GATE != "none":
        if FACTORS > 1:
            m &= row % FACTORS == 0
            row = row // FACTORS
        b_g += tl.load(gate + row * HV + i_h, mask=m, other=0.0).to(tl.float32)
        if GATE == "raw":
            b_a = b_g + tl.load(dt_bias + i_h).to(tl.float32)
            softplus = tl.maximum(b_a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(b_a)))
            b_g = -tl.exp(tl.load(A_log + i_h).to(tl.float32)) * softplus
        b_g = tl.where(m, b_g * 1.4426950408889634, 0.0)
    return b_g


@triton.jit
def _step_sizes(beta, row, m, i_h, beta_range, HV: tl.constexpr, RAW_BETA: tl.constexpr):
    # Return the step sizes of some steps; 0, which is the identity, where m is false.
    b_beta = tl.load(beta + row * HV + i_h, mask=m, other=0.0).to(tl.float32)
    if RAW_BETA:
        b_beta = beta_range * tl.sigmoid(b_beta)
    return tl.where(m, b_beta, 0.0)


@triton.jit
def _log_norm(kk, m, NORMALIZE: tl.constexpr):
    # Return log2 of the inverse norms of a block's keys. Their squares are on the diagonal of K_I K_I^T.
    o = tl.arange(0, 16)
    if not NORMALIZE:
        return tl.zeros([16], tl.float32)
    square = tl.sum(tl.where(o[:, None] == o[None, :], kk, 0.0), 1)
    return tl.where(m, -0.5 * tl.log2(tl.maximum(square, 1e-12)), 0.0)


@triton.jit
def _coupling(kk, g_i, r_i, g_j, r_j):
    # Return M_IJ = G . K^_I K^_J^T for I > J. Norms (log2) join the gates in the exponent.
    return kk * tl.exp2((g_i + r_i)[:, None] - (g_j - r_j)[None, :])


@triton.jit
def _coupling_inside(kk, g, r):
    # Return M_II. The gates above the diagonal would overflow, so the exponent is masked, not the product.
    o = tl.arange(0, 16)
    below = o[:, None] > o[None, :]
    return kk * tl.exp2(tl.where(below, (g + r)[:, None] - (g - r)[None, :], float("-inf")))


@triton.jit
def _split(x, dtype: tl.constexpr):
    # Return x as a sum of two numbers of a dtype. float32 is left to tf32x3.
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def _product(a, b):
    # Return a b, where both are sums of two numbers.
    if a[0].dtype == tl.float32:
        return tl.dot(a[0], b[0], input_precision="tf32x3")
    small = tl.dot(a[1], b[0], tl.dot(a[0], b[1]))
    return tl.dot(a[0], b[0], small)


@triton.jit
def _substitute(p_m, p_beta, step, left):
    # C_i = M_i - sum_{l < i} M_il beta_l C_l, in the four diagonal blocks side by side. A lane holds columns, so it
    # needs one number of M for each block. To read it where M was put costs less than from the registers of other
    # lanes.
    o_b = 16 * tl.arange(0, 4)
    p_row = p_m + o_b[:, None] * step + tl.arange(0, 16)[None, :]
    scaled = ()
    for i in tl.static_range(16):
        m_i = o_b + i < left
        c_i = tl.load(p_row + i * step, mask=m_i[:, None], other=0.0)
        for l in tl.static_range(i):
            c_i -= tl.load(p_m + (o_b + i) * step + l, mask=m_i, other=0.0)[:, None] * scaled[l]
        scaled = scaled + (c_i * tl.load(p_beta + o_b + i)[:, None],)  # type: ignore[assignment]  # noqa: RUF005
        tl.store(p_row + i * step + 16, c_i, mask=m_i[:, None])


@triton.jit(do_not_specialize=["T", "R", "beta_range"])
def chunk_inverse_kernel(
    k,
    gate,
    beta,
    A_log,
    dt_bias,
    c_out,
    vectors,
    cu_seqlens,
    chunk_table,
    T,
    R,
    beta_range,
    stride_k,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    FACTORS: tl.constexpr,
    GATE: tl.constexpr,
    RAW_BETA: tl.constexpr,
    NORMALIZE: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    IS_FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    STEPS: tl.constexpr = BT // FACTORS * FACTORS
    i_n, i_t, bos, length = chunk_position(i_c, cu_seqlens, chunk_table, T, STEPS, IS_VARLEN)
    o_t = tl.arange(0, BT)
    p_g = vectors + 4 * i_h.to(tl.int64) * R + i_c * BT
    if i_n < 0:  # there is no such chunk, but nothing that is returned stays unwritten
        for i in range(4):
            tl.store(p_g + i * R + o_t, tl.zeros([BT], tl.float32))
        return
    first = bos + i_t * STEPS
    left = rows_left(length, i_t, STEPS, BT, IS_FULL)
    o_r = tl.arange(0, 16)
    row = (first + o_r).to(tl.int64)

    # The step sizes, and the log-gates accumulated over the chunk.
    beta0 = _step_sizes(beta, row, o_r < left, i_h, beta_range, HV, RAW_BETA)
    beta1 = _step_sizes(beta, row + 16, o_r + 16 < left, i_h, beta_range, HV, RAW_BETA)
    beta2 = _step_sizes(beta, row + 32, o_r + 32 < left, i_h, beta_range, HV, RAW_BETA)
    beta3 = _step_sizes(beta, row + 48, o_r + 48 < left, i_h, beta_range, HV, RAW_BETA)
    g0 = tl.cumsum(_log_gates(gate, A_log, dt_bias, row, o_r < left, i_h, HV, FACTORS, GATE), 0)
    g1 = tl.cumsum(_log_gates(gate, A_log, dt_bias, row + 16, o_r + 16 < left, i_h, HV, FACTORS, GATE), 0)
    g2 = tl.cumsum(_log_gates(gate, A_log, dt_bias, row + 32, o_r + 32 < left, i_h, HV, FACTORS, GATE), 0)
    g3 = tl.cumsum(_log_gates(gate, A_log, dt_bias, row + 48, o_r + 48 < left, i_h, HV, FACTORS, GATE), 0)
    g1 += tl.sum(tl.where(o_r == 15, g0, 0.0), 0)
    g2 += tl.sum(tl.where(o_r == 15, g1, 0.0), 0)
    g3 += tl.sum(tl.where(o_r == 15, g2, 0.0), 0)

    # K_I K_J^T of the blocks of 16 tokens, one slice of the keys at a time.
    m_0, m_1 = o_r[:, None] < left, o_r[:, None] < left - 16
    m_2, m_3 = o_r[:, None] < left - 32, o_r[:, None] < left - 48
    p_k = k + (first + o_r[:, None]).to(tl.int64) * stride_k + (i_h // (HV // H)) * K + tl.arange(0, BK)[None, :]
    m00 = tl.zeros([16, 16], tl.float32)
    m10, m11, m20, m21, m22, m30, m31, m32, m33 = m00, m00, m00, m00, m00, m00, m00, m00, m00
    for i_k in range(0, K, BK):
        b_k0 = tl.load(p_k + i_k, mask=m_0, other=0.0)
        b_k1 = tl.load(p_k + i_k + 16 * stride_k, mask=m_1, other=0.0)
        b_k2 = tl.load(p_k + i_k + 32 * stride_k, mask=m_2, other=0.0)
        b_k3 = tl.load(p_k + i_k + 48 * stride_k, mask=m_3, other=0.0)
        m00 = tl.dot(b_k0, tl.trans(b_k0), m00, input_precision=PRECISION)
        m10 = tl.dot(b_k1, tl.trans(b_k0), m10, input_precision=PRECISION)
        m20 = tl.dot(b_k2, tl.trans(b_k0), m20, input_precision=PRECISION)
        m30 = tl.dot(b_k3, tl.trans(b_k0), m30, input_precision=PRECISION)
        m11 = tl.dot(b_k1, tl.trans(b_k1), m11, input_precision=PRECISION)
        m21 = tl.dot(b_k2, tl.trans(b_k1), m21, input_precision=PRECISION)
        m31 = tl.dot(b_k3, tl.trans(b_k1), m31, input_precision=PRECISION)
        m22 = tl.dot(b_k2, tl.trans(b_k2), m22, input_precision=PRECISION)
        m32 = tl.dot(b_k3, tl.trans(b_k2), m32, input_precision=PRECISION)
        m33 = tl.dot(b_k3, tl.trans(b_k3), m33, input_precision=PRECISION)

    r0 = _log_norm(m00, o_r < left, NORMALIZE)
    r1 = _log_norm(m11, o_r + 16 < left, NORMALIZE)
    r2 = _log_norm(m22, o_r + 32 < left, NORMALIZE)
    r3 = _log_norm(m33, o_r + 48 < left, NORMALIZE)
    p_v = p_g + o_r
    tl.store(p_v, g0)
    tl.store(p_v + 16, g1)
    tl.store(p_v + 32, g2)
    tl.store(p_v + 48, g3)
    tl.store(p_v + R, beta0)
    tl.store(p_v + R + 16, beta1)
    tl.store(p_v + R + 32, beta2)
    tl.store(p_v + R + 48, beta3)
    tl.store(p_v + 2 * R, r0)
    tl.store(p_v + 2 * R + 16, r1)
    tl.store(p_v + 2 * R + 32, r2)
    tl.store(p_v + 2 * R + 48, r3)
    if not NORMALIZE:  # otherwise `chunk_forward` writes it
        tl.store(p_g + 3 * R + o_t, tl.zeros([BT], tl.float32))

    # The diagonal blocks: M_II goes to the lanes that need it through the memory of C, and C_II comes back.
    dtype = c_out.dtype.element_ty
    p_c = c_out + (first.to(tl.int64) * HV + i_h) * BT
    p_m = p_c.to(tl.pointer_type(tl.float32))
    step: tl.constexpr = HV * BT * dtype.primitive_bitwidth // 32
    p_b = p_m + o_r[:, None] * step + o_r[None, :]
    tl.store(p_b, _coupling_inside(m00, g0, r0), mask=m_0)
    tl.store(p_b + 16 * step, _coupling_inside(m11, g1, r1), mask=m_1)
    tl.store(p_b + 32 * step, _coupling_inside(m22, g2, r2), mask=m_2)
    tl.store(p_b + 48 * step, _coupling_inside(m33, g3, r3), mask=m_3)
    tl.debug_barrier()
    _substitute(p_m, p_g + R, step, left)
    tl.debug_barrier()
    c00 = tl.load(p_b + 16, mask=m_0, other=0.0)
    c11 = tl.load(p_b + 16 * step + 16, mask=m_1, other=0.0)
    c22 = tl.load(p_b + 32 * step + 16, mask=m_2, other=0.0)
    c33 = tl.load(p_b + 48 * step + 16, mask=m_3, other=0.0)
    tl.debug_barrier()

    # C_IJ = (I - C_II diag(beta_I)) (M_IJ - sum_{J <= L < I} M_IL diag(beta_L) C_LJ)
    m10 = _coupling(m10, g1, r1, g0, r0)
    m20 = _coupling(m20, g2, r2, g0, r0)
    m30 = _coupling(m30, g3, r3, g0, r0)
    m21 = _coupling(m21, g2, r2, g1, r1)
    m31 = _coupling(m31, g3, r3, g1, r1)
    m32 = _coupling(m32, g3, r3, g2, r2)
    s00, s11, s22, s33 = _split(c00, dtype), _split(c11, dtype), _split(c22, dtype), _split(c33, dtype)
    n10, n21, n32 = _split(m10 * beta0, dtype), _split(m21 * beta1, dtype), _split(m32 * beta2, dtype)
    n20, n31 = _split(m20 * beta0, dtype), _split(m31 * beta1, dtype)
    n30 = _split(m30 * beta0, dtype)
    c10 = m10 - _product(n10, s00)
    c10 -= _product(s11, _split(c10 * beta1[:, None], dtype))
    c21 = m21 - _product(n21, s11)
    c21 -= _product(s22, _split(c21 * beta2[:, None], dtype))
    c32 = m32 - _product(n32, s22)
    c32 -= _product(s33, _split(c32 * beta3[:, None], dtype))
    s10 = _split(c10, dtype)
    c20 = m20 - _product(n20, s00) - _product(n21, s10)
    c20 -= _product(s22, _split(c20 * beta2[:, None], dtype))
    c31 = m31 - _product(n31, s11) - _product(n32, _split(c21, dtype))
    c31 -= _product(s33, _split(c31 * beta3[:, None], dtype))
    c30 = m30 - _product(n30, s00) - _product(n31, s10) - _product(n32, _split(c20, dtype))
    c30 -= _product(s33, _split(c30 * beta3[:, None], dtype))

    p_c += o_r[:, None] * HV * BT + o_r[None, :]
    zero = tl.zeros([16, 16], dtype)
    rows: tl.constexpr = 16 * HV * BT
    tl.store(p_c, c00.to(dtype), mask=m_0)
    tl.store(p_c + 16, zero, mask=m_0)
    tl.store(p_c + 32, zero, mask=m_0)
    tl.store(p_c + 48, zero, mask=m_0)
    tl.store(p_c + rows, c10.to(dtype), mask=m_1)
    tl.store(p_c + rows + 16, c11.to(dtype), mask=m_1)
    tl.store(p_c + rows + 32, zero, mask=m_1)
    tl.store(p_c + rows + 48, zero, mask=m_1)
    tl.store(p_c + 2 * rows, c20.to(dtype), mask=m_2)
    tl.store(p_c + 2 * rows + 16, c21.to(dtype), mask=m_2)
    tl.store(p_c + 2 * rows + 32, c22.to(dtype), mask=m_2)
    tl.store(p_c + 2 * rows + 48, zero, mask=m_2)
    tl.store(p_c + 3 * rows, c30.to(dtype), mask=m_3)
    tl.store(p_c + 3 * rows + 16, c31.to(dtype), mask=m_3)
    tl.store(p_c + 3 * rows + 32, c32.to(dtype), mask=m_3)
    tl.store(p_c + 3 * rows + 48, c33.to(dtype), mask=m_3)


def launch_chunk_inverse(
    call: Call, operands: Operands, gate: Tensor | None, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None
) -> None:
    """Launch the kernel, as `Backend.chunk_inverse` says."""
    launch(
        chunk_inverse_kernel,
        (call.chunks.count, call.HV, 1),
        operands.keys,
        None if gate is None else gate.contiguous(),
        beta.contiguous(),
        A_log,
        dt_bias,
        operands.c.base,
        operands.vectors,
        call.cu_seqlens,
        call.chunks.table,
        call.chunks.seq_len,
        call.R,
        call.beta_range or 0.0,
        operands.keys.stride(1),
        BK=64,
        GATE=call.gate,
        RAW_BETA=call.beta_range is not None,
        **INVERSE_LAUNCH,
        FACTORS=call.factors,
        **call.sizes,
        **call.flags,
    )
