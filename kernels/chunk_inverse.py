"""Per chunk of 64 tokens: gates, step sizes, key norms, and the matrix that turns the recurrence into products.

With unit keys k^_i = r_i k_i (r_i = 1/|k_i|, or 1 where keys are used as given), the log-gate g_i accumulated inside
the chunk and G_ij = exp(g_i - g_j), the chunk's tokens are coupled by

    M = tril(G . K^ K^^T, -1)          C = M (I + diag(beta) M)^-1          (strictly lower, |C_ij| <= 1 for unit keys)

so that (I + diag(beta) M)^-1 = I - diag(beta) C: the identity and beta stay in float32 outside of C, which alone is
rounded. arXiv 2406.06484, section 3.2 (WY form); the gate commutes with the inverse (arXiv 2412.06464, section 3.3).

C is found by forward substitution in float32 in blocks of 16, merged with products of float32 accuracy (tf32x3). A
power series for the inverse would lose everything for nearly parallel keys at beta near 2.
"""

import triton
import triton.language as tl

from lrnn.kernels.tiles import chunk_position


@triton.jit
def _merge(rest, c_row, beta_row):
    # (I + M_II diag(beta_I))^-1 R = R - C_II (beta_I R)
    return rest - tl.dot(c_row, rest * beta_row[:, None], input_precision="tf32x3")


@triton.jit
def _through(m, beta, c):
    # M_IL diag(beta_L) C_LJ
    return tl.dot(m * beta[None, :], c, input_precision="tf32x3")


@triton.jit
def _coupling(kk, r_i, r_j, g_i, g_j):
    # M_IJ = G . K^_I K^_J^T for I > J
    return kk * r_i[:, None] * r_j[None, :] * tl.exp2(g_i[:, None] - g_j[None, :])


@triton.jit
def _diagonal(kk, g_i, NORMALIZE: tl.constexpr):
    # M_II and the inverse norms of its keys, which stand on the diagonal of K_I K_I^T
    o_r = tl.arange(0, 16)[:, None]
    o_c = tl.arange(0, 16)[None, :]
    if NORMALIZE:
        r = tl.rsqrt(tl.maximum(tl.sum(tl.where(o_r == o_c, kk, 0.0), 1), 1e-12))
    else:
        r = tl.full([16], 1.0, tl.float32)
    # The gates above the diagonal would overflow: mask the exponent, not the product.
    decay = tl.exp2(tl.where(o_r > o_c, g_i[:, None] - g_i[None, :], 0.0))
    return tl.where(o_r > o_c, kk * r[:, None] * r[None, :] * decay, 0.0), r


@triton.jit
def _block(x, I: tl.constexpr):
    # the I-th 16 of 64 numbers
    o = tl.arange(0, 4)[:, None]
    return tl.sum(tl.where(o == I, tl.reshape(x, [4, 16]), 0.0), 0)


@triton.jit
def _eliminate(c, low, j):
    # row j is final: take its part out of the rows below, C_i -= (M_ij beta_j) C_j
    o_r = tl.arange(0, 16)[:, None]
    o_c = tl.arange(0, 16)[None, :]
    column = tl.sum(tl.where(o_c == j, low, 0.0), 1)
    row = tl.sum(tl.where(o_r == j, c, 0.0), 0)
    return c - column[:, None] * row[None, :]


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
    GATE: tl.constexpr,
    RAW_BETA: tl.constexpr,
    NORMALIZE: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    i_n, i_t, bos, length = chunk_position(i_c, cu_seqlens, chunk_table, T, BT, IS_VARLEN)
    o_t = tl.arange(0, BT)
    p_g = vectors + 4 * i_h.to(tl.int64) * R + i_c * BT
    if i_n < 0:  # nothing that is returned stays unwritten
        for i in range(4):
            tl.store(p_g + i * R + o_t, tl.zeros([BT], tl.float32))
        return
    first = bos + i_t * BT
    m_t = i_t * BT + o_t < length
    row = (first + o_t).to(tl.int64)

    # step sizes and log-gates (base 2, accumulated over the chunk); the identity past the end of the sequence
    b_beta = tl.load(beta + row * HV + i_h, mask=m_t, other=0.0).to(tl.float32)
    if RAW_BETA:
        b_beta = beta_range * tl.sigmoid(b_beta)
    b_beta = tl.where(m_t, b_beta, 0.0)
    b_g = tl.zeros([BT], tl.float32)
    if GATE != "none":
        b_g = tl.load(gate + row * HV + i_h, mask=m_t, other=0.0).to(tl.float32)
        if GATE == "raw":
            b_a = b_g + tl.load(dt_bias + i_h).to(tl.float32)
            softplus = tl.maximum(b_a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(b_a)))
            b_g = -tl.exp(tl.load(A_log + i_h).to(tl.float32)) * softplus
        b_g = tl.cumsum(tl.where(m_t, b_g * 1.4426950408889634, 0.0), 0)
    tl.store(p_g + o_t, b_g)
    tl.store(p_g + R + o_t, b_beta)

    # K_I K_J^T of the blocks of 16 tokens, a slice of the keys at a time
    o_r = tl.arange(0, 16)
    left = length - i_t * BT
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

    g0, g1, g2, g3 = _block(b_g, 0), _block(b_g, 1), _block(b_g, 2), _block(b_g, 3)
    beta0, beta1, beta2, beta3 = _block(b_beta, 0), _block(b_beta, 1), _block(b_beta, 2), _block(b_beta, 3)
    m00, r0 = _diagonal(m00, g0, NORMALIZE)
    m11, r1 = _diagonal(m11, g1, NORMALIZE)
    m22, r2 = _diagonal(m22, g2, NORMALIZE)
    m33, r3 = _diagonal(m33, g3, NORMALIZE)
    if NORMALIZE:
        p_r = p_g + 2 * R + o_r
        tl.store(p_r, tl.where(o_r < left, tl.log2(r0), 0.0))
        tl.store(p_r + 16, tl.where(o_r < left - 16, tl.log2(r1), 0.0))
        tl.store(p_r + 32, tl.where(o_r < left - 32, tl.log2(r2), 0.0))
        tl.store(p_r + 48, tl.where(o_r < left - 48, tl.log2(r3), 0.0))
    else:
        tl.store(p_g + 2 * R + o_t, tl.zeros([BT], tl.float32))
        tl.store(p_g + 3 * R + o_t, tl.zeros([BT], tl.float32))

    # C_II = M_II - (M_II diag(beta_I)) C_II, the four blocks side by side
    c00, c11, c22, c33 = m00, m11, m22, m33
    low0, low1, low2, low3 = m00 * beta0[None, :], m11 * beta1[None, :], m22 * beta2[None, :], m33 * beta3[None, :]
    for j in range(15):
        c00 = _eliminate(c00, low0, j)
        c11 = _eliminate(c11, low1, j)
        c22 = _eliminate(c22, low2, j)
        c33 = _eliminate(c33, low3, j)

    # C_IJ = (I - C_II diag(beta_I)) (M_IJ - sum_{J <= L < I} M_IL diag(beta_L) C_LJ)
    m10 = _coupling(m10, r1, r0, g1, g0)
    c10 = _merge(m10 - _through(m10, beta0, c00), c11, beta1)
    m21 = _coupling(m21, r2, r1, g2, g1)
    m20 = _coupling(m20, r2, r0, g2, g0)
    c21 = _merge(m21 - _through(m21, beta1, c11), c22, beta2)
    c20 = _merge(m20 - _through(m20, beta0, c00) - _through(m21, beta1, c10), c22, beta2)
    m32 = _coupling(m32, r3, r2, g3, g2)
    m31 = _coupling(m31, r3, r1, g3, g1)
    m30 = _coupling(m30, r3, r0, g3, g0)
    c32 = _merge(m32 - _through(m32, beta2, c22), c33, beta3)
    c31 = _merge(m31 - _through(m31, beta1, c11) - _through(m32, beta2, c21), c33, beta3)
    rest = m30 - _through(m30, beta0, c00) - _through(m31, beta1, c10) - _through(m32, beta2, c20)
    c30 = _merge(rest, c33, beta3)

    p_c = c_out + ((first + o_r[:, None]).to(tl.int64) * HV + i_h) * BT + o_r[None, :]
    dtype = c_out.dtype.element_ty
    zero = tl.zeros([16, 16], dtype)
    step = 16 * HV * BT
    tl.store(p_c, c00.to(dtype), mask=m_0)
    tl.store(p_c + 16, zero, mask=m_0)
    tl.store(p_c + 32, zero, mask=m_0)
    tl.store(p_c + 48, zero, mask=m_0)
    tl.store(p_c + step, c10.to(dtype), mask=m_1)
    tl.store(p_c + step + 16, c11.to(dtype), mask=m_1)
    tl.store(p_c + step + 32, zero, mask=m_1)
    tl.store(p_c + step + 48, zero, mask=m_1)
    tl.store(p_c + 2 * step, c20.to(dtype), mask=m_2)
    tl.store(p_c + 2 * step + 16, c21.to(dtype), mask=m_2)
    tl.store(p_c + 2 * step + 32, c22.to(dtype), mask=m_2)
    tl.store(p_c + 2 * step + 48, zero, mask=m_2)
    tl.store(p_c + 3 * step, c30.to(dtype), mask=m_3)
    tl.store(p_c + 3 * step + 16, c31.to(dtype), mask=m_3)
    tl.store(p_c + 3 * step + 32, c32.to(dtype), mask=m_3)
    tl.store(p_c + 3 * step + 48, c33.to(dtype), mask=m_3)
