"""The Triton kernels of the short convolution, which compute all tensors in one launch.

    z_t = sum_j w_j x_{t-j}       y_t = z_t sigmoid(z_t)        w_j = weight[:, 0, taps - 1 - j]

    dz_t = dy_t sigmoid(z_t) (1 + z_t (1 - sigmoid(z_t)))       with z_t computed again
    dx_t = sum_j w_j dz_{t+j}                                   dw_j = sum_t dz_t x_{t-j}

Both kernels are bound by memory. A program owns a column of channels of one tensor, 16 bytes of them per thread, and
walks down a block of tokens with the last inputs in registers. Each input is read once, apart from the few rows that
blocks share, and the sums over time of the backward pass need no exchange between threads.

Arguments that differ from tensor to tensor are tuples: the pointers x, w, before, y, dy and dx, the numbers of channels
D, and the numbers of elements S, SB and SO between rows of x, of `before` and of dx. Inside a program, p_x and the
like, D_c, S_c, SB_c and SO_c belong to the tensor of its column.

What belongs to the taps is a tuple of W vectors [BD]: b_x[j] is x_{t-j}, b_w[j] is w_j, b_dw[j] is the sum for dw_j.

    W: taps    BT, BD: tokens and channels per program    BR: tokens loaded at a time    NT: blocks per sequence
    N: documents
    i_c, i_b, i_t: the program's column of channels, sequence, and block of tokens
"""

# mypy: disable-error-code="assignment"
# Loops append to tuples, whose type then changes.

import triton
import triton.language as tl


@triton.constexpr_function
def starts(sizes, unit=1):
    """Return where each of the adjacent ranges of these sizes starts and, at last, where they end, in units."""
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + -(-size // unit))
    return tuple(bounds)


@triton.jit
def _choose(i_c, items, COLUMNS: tl.constexpr):
    # The item of the tensor to which the i_c-th column of channels belongs: tensor i has the columns from COLUMNS[i] to
    # COLUMNS[i + 1] - 1.
    LAST: tl.constexpr = len(COLUMNS) - 2
    item = items[LAST]
    for i in tl.static_range(LAST - 1, -1, -1):
        if i_c < COLUMNS[i + 1]:
            item = items[i]
    return item


@triton.jit
def _load_taps(w, o_d, m_d, W: tl.constexpr, BD: tl.constexpr):
    # The weights [D, W] of a column as (w_0, w_1, ...), each [BD]; w_0 belongs to the newest input.
    o_w = tl.arange(0, 4)
    b_w = tl.load(w + o_d[:, None] * W + o_w[None, :], mask=m_d[:, None] & (o_w[None, :] < W), other=0.0)
    b_even, b_odd = tl.split(tl.reshape(b_w.to(tl.float32), [BD, 2, 2]))
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    if W == 4:
        return b_3, b_2, b_1, b_0
    elif W == 3:
        return b_2, b_1, b_0
    else:
        return b_1, b_0


@triton.jit
def _store_taps(dw, o_d, m_d, b_dw, W: tl.constexpr, BD: tl.constexpr):
    # The reverse of `_load_taps`. What is past the last tap is not stored.
    if W == 4:
        b_all = tl.join(tl.join(b_dw[3], b_dw[1]), tl.join(b_dw[2], b_dw[0]))
    elif W == 3:
        b_all = tl.join(tl.join(b_dw[2], b_dw[0]), tl.join(b_dw[1], b_dw[0]))
    else:
        b_all = tl.join(tl.join(b_dw[1], b_dw[0]), tl.join(b_dw[0], b_dw[0]))
    o_w = tl.arange(0, 4)
    m_w = m_d[:, None] & (o_w[None, :] < W)
    tl.store(dw + o_d[:, None] * W + o_w[None, :], tl.reshape(b_all, [BD, 4]), mask=m_w)


@triton.jit
def _documents(cu_seqlens, N, row, rows):
    # For at most 128 flattened rows from `row` on: where the document of the first row starts, where the document of
    # the last row ends, and two words whose bits say which rows start a document.
    start = tl.full([], 0, tl.int64)
    stop = tl.full([], 1 << 62, tl.int64)
    low = tl.full([], 0, tl.int64)
    high = tl.full([], 0, tl.int64)
    for i in range(0, N + 1, 256):
        o_n = i + tl.arange(0, 256)
        b_c = tl.load(cu_seqlens + o_n, mask=o_n <= N, other=0).to(tl.int64)
        b_next = tl.load(cu_seqlens + o_n + 1, mask=o_n < N, other=-1).to(tl.int64)
        m_c = (o_n <= N) & (b_c != b_next)  # an empty document repeats a boundary, and each bit must be added once
        start = tl.maximum(start, tl.max(tl.where(m_c & (b_c <= row), b_c, 0), 0))
        stop = tl.minimum(stop, tl.min(tl.where(m_c & (b_c >= row + rows), b_c, 1 << 62), 0))
        o_r = b_c - row
        b_bit = tl.full([256], 1, tl.int64) << (o_r & 63)
        low += tl.sum(tl.where(m_c & (o_r >= 0) & (o_r < 64), b_bit, 0), 0)
        high += tl.sum(tl.where(m_c & (o_r >= 64) & (o_r < 128), b_bit, 0), 0)
    return start, stop, low, high


@triton.jit
def _first_age(start, low, bos, t0, W: tl.constexpr, HAS_BEFORE: tl.constexpr):
    # The number of tokens of its document ahead of row t0, and the first word without the start of a sequence that
    # `before` is ahead of. That document has all taps, so that its age counts from W - 1.
    age = bos + t0 - start
    if HAS_BEFORE:
        age += tl.where(start == bos, W - 1, 0)
        low = tl.where(t0 == 0, low & ~1, low)
    return age, low


@triton.jit
def _age(age, low, high, i):
    # The number of tokens of its document ahead of the i-th row. `age` is that number if no document starts there.
    starts = (tl.where(i < 64, low, high) >> (i & 63)) & 1
    return tl.where(starts == 1, 0, age)


@triton.jit
def _same_document(age, b_v, W: tl.constexpr, IS_VARLEN: tl.constexpr):
    # b_v with zero for b_v[j] if the row j rows back belongs to another document.
    if IS_VARLEN:
        b_same = (b_v[0],)
        for j in tl.static_range(1, W):
            b_same += (tl.where(age >= j, b_v[j], 0.0),)
        return b_same
    else:
        return b_v


@triton.jit
def _channels(o_d, D, inside):
    # The mask of the channels that exist, all False in a row that is not `inside`. (And-ing a scalar condition to a
    # mask compiles to the same code, but goes wrong in the interpreter of Triton 3.9.)
    return o_d < tl.where(inside, D, 0)


@triton.jit
def _load_row(x, t, end, S, o_d, D):
    # Row t [BD], zero from `end` on.
    return tl.load(x + t.to(tl.int64) * S + o_d, mask=_channels(o_d, D, t < end), other=0.0)


@triton.jit
def _load_rows(x, t, end, S, o_d, D, COUNT: tl.constexpr):
    # Rows t, t + 1, ..., loaded one after the other so that enough loads are under way.
    b_rows = ()
    for r in tl.static_range(COUNT):
        b_rows += (_load_row(x, t + r, end, S, o_d, D),)
    return b_rows


@triton.jit
def _store_row(y, t, inside, S, o_d, D, b_y):
    # Row t [BD], unless it is not `inside`.
    tl.store(y + t.to(tl.int64) * S + o_d, b_y.to(y.dtype.element_ty), mask=_channels(o_d, D, inside))


@triton.jit
def _load_row_before(x, before, i_b, t, S, SB, o_d, D, W: tl.constexpr, HAS_BEFORE: tl.constexpr):
    # Row t of a sequence. Rows ahead of its start come from `before` or are zero.
    b_x = tl.load(x + t.to(tl.int64) * S + o_d, mask=_channels(o_d, D, t >= 0), other=0.0).to(tl.float32)
    if HAS_BEFORE:
        row = i_b.to(tl.int64) * (W - 1) + (W - 1) + t
        m_b = _channels(o_d, D, (t < 0) & (t >= 1 - W))
        b_x += tl.load(before + row * SB + o_d, mask=m_b, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _load_rows_before(x, before, i_b, t, S, SB, o_d, D, W: tl.constexpr, HAS_BEFORE: tl.constexpr):
    # (x_{t-1}, x_{t-2}, ...), as many as there are taps besides the newest.
    b_rows = ()
    for j in tl.static_range(1, W):
        b_rows += (_load_row_before(x, before, i_b, t - j, S, SB, o_d, D, W, HAS_BEFORE),)
    return b_rows


@triton.jit
def _with_past(b_new, b_past):
    return (b_new.to(tl.float32),) + b_past  # noqa: RUF005  Triton takes no `*b_past` in a tuple


@triton.jit
def _convolve(b_x, b_w, W: tl.constexpr):
    # z_t = sum_j w_j x_{t-j}
    b_z = b_w[0] * b_x[0] + b_w[1] * b_x[1]
    for j in tl.static_range(2, W):
        b_z += b_w[j] * b_x[j]
    return b_z


@triton.jit
def _activation_gradient(b_z, b_dy):
    # dz = dy sigmoid(z) (1 + z (1 - sigmoid(z)))
    b_s = tl.sigmoid(b_z)
    return b_dy.to(tl.float32) * b_s * (1.0 + b_z * (1.0 - b_s))


@triton.jit
def _zeros(COUNT: tl.constexpr, BD: tl.constexpr):
    b_zeros = ()
    for _ in tl.static_range(COUNT):
        b_zeros += (tl.zeros([BD], tl.float32),)
    return b_zeros


@triton.jit
def _add_to_taps(b_dw, b_dz, b_x, W: tl.constexpr):
    # dw_j += dz_t x_{t-j}
    b_sums = ()
    for j in tl.static_range(W):
        b_sums += (b_dw[j] + b_dz * b_x[j],)
    return b_sums


@triton.jit
def _scatter(b_dz, b_a, b_w, age, W: tl.constexpr, IS_VARLEN: tl.constexpr):
    # dx_{t-j} += w_j dz_t, with b_a[j - 1] the sum for dx_{t-j} so far. This completes dx_{t-W+1}; the other sums move
    # on by a row.
    b_copies = ()
    for _ in tl.static_range(W):
        b_copies += (b_dz,)
    b_dzs = _same_document(age, b_copies, W, IS_VARLEN)
    b_dx = b_a[W - 2] + b_w[W - 1] * b_dzs[W - 1]
    b_sums = (b_w[0] * b_dz,)
    for j in tl.static_range(1, W - 1):
        b_sums += (b_a[j - 1] + b_w[j] * b_dzs[j],)
    return b_dx, b_sums


@triton.jit(do_not_specialize=["T", "NT", "N"])
def short_conv_forward_kernel(
    x,
    w,
    before,
    y,
    cu_seqlens,
    T,
    NT,
    N,
    D: tl.constexpr,
    S: tl.constexpr,
    SB: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    IS_VARLEN: tl.constexpr,
):
    COLUMNS: tl.constexpr = starts(D, BD)
    i_c = tl.program_id(0) % COLUMNS[-1]
    i_bt = tl.program_id(0) // COLUMNS[-1]
    i_b, i_t = i_bt // NT, i_bt % NT
    o_d = (i_c - _choose(i_c, COLUMNS, COLUMNS)) * BD + tl.arange(0, BD)
    D_c = _choose(i_c, D, COLUMNS)
    S_c = _choose(i_c, S, COLUMNS)
    m_d = o_d < D_c
    bos = i_b.to(tl.int64) * T
    p_x = _choose(i_c, x, COLUMNS) + bos * S_c
    p_y = _choose(i_c, y, COLUMNS) + bos * D_c
    b_w = _load_taps(_choose(i_c, w, COLUMNS), o_d, m_d, W, BD)
    if HAS_BEFORE:
        p_before = _choose(i_c, before, COLUMNS)
        SB_c = _choose(i_c, SB, COLUMNS)
    else:
        p_before, SB_c = p_x, S_c

    t0 = i_t * BT
    rows = tl.minimum(BT, T - t0)
    end = t0 + rows
    age = 0
    if IS_VARLEN:
        start, _, low, high = _documents(cu_seqlens, N, bos + t0, rows)
        age, low = _first_age(start, low, bos, t0, W, HAS_BEFORE)
    b_past = _load_rows_before(p_x, p_before, i_b, t0, S_c, SB_c, o_d, D_c, W, HAS_BEFORE)
    for i in range(0, rows, BR):
        t = t0 + i
        b_new = _load_rows(p_x, t, end, S_c, o_d, D_c, BR)
        for r in tl.static_range(BR):
            b_x = _with_past(b_new[r], b_past)
            if IS_VARLEN:
                age = _age(age, low, high, i + r)
            b_x = _same_document(age, b_x, W, IS_VARLEN)
            age += 1
            b_z = _convolve(b_x, b_w, W)
            b_y = b_z * tl.sigmoid(b_z)
            _store_row(p_y, t + r, t + r < end, D_c, o_d, D_c, b_y)
            b_past = b_x[: W - 1]


@triton.jit(do_not_specialize=["T", "NT", "N"])
def short_conv_backward_kernel(
    x,
    w,
    before,
    dy,
    dx,
    dw_parts,
    cu_seqlens,
    T,
    NT,
    N,
    D: tl.constexpr,
    S: tl.constexpr,
    SB: tl.constexpr,
    SO: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    IS_VARLEN: tl.constexpr,
):
    COLUMNS: tl.constexpr = starts(D, BD)
    i_c = tl.program_id(0) % COLUMNS[-1]
    i_bt = tl.program_id(0) // COLUMNS[-1]
    i_b, i_t = i_bt // NT, i_bt % NT
    o_d = (i_c - _choose(i_c, COLUMNS, COLUMNS)) * BD + tl.arange(0, BD)
    D_c = _choose(i_c, D, COLUMNS)
    S_c = _choose(i_c, S, COLUMNS)
    SO_c = _choose(i_c, SO, COLUMNS)
    m_d = o_d < D_c
    bos = i_b.to(tl.int64) * T
    p_x = _choose(i_c, x, COLUMNS) + bos * S_c
    p_dy = _choose(i_c, dy, COLUMNS) + bos * D_c
    p_dx = _choose(i_c, dx, COLUMNS) + bos * SO_c
    b_w = _load_taps(_choose(i_c, w, COLUMNS), o_d, m_d, W, BD)
    if HAS_BEFORE:
        p_before = _choose(i_c, before, COLUMNS)
        SB_c = _choose(i_c, SB, COLUMNS)
    else:
        p_before, SB_c = p_x, S_c

    t0 = i_t * BT
    rows = tl.minimum(BT, T - t0)
    end = t0 + rows
    last = T
    age = 0
    if IS_VARLEN:
        start, stop, low, high = _documents(cu_seqlens, N, bos + t0, rows)
        age, low = _first_age(start, low, bos, t0, W, HAS_BEFORE)
        last = tl.minimum(stop - bos, T).to(tl.int32)
    b_past = _load_rows_before(p_x, p_before, i_b, t0, S_c, SB_c, o_d, D_c, W, HAS_BEFORE)
    b_a = _zeros(W - 1, BD)
    b_dw = _zeros(W, BD)
    for i in range(0, rows, BR):
        b_new = _load_rows(p_x, t0 + i, end, S_c, o_d, D_c, BR)
        b_dys = _load_rows(p_dy, t0 + i, end, D_c, o_d, D_c, BR)
        for r in tl.static_range(BR):
            b_x = _with_past(b_new[r], b_past)
            if IS_VARLEN:
                age = _age(age, low, high, i + r)
            b_x = _same_document(age, b_x, W, IS_VARLEN)
            b_dz = _activation_gradient(_convolve(b_x, b_w, W), b_dys[r])
            b_dw = _add_to_taps(b_dw, b_dz, b_x, W)
            b_dx, b_a = _scatter(b_dz, b_a, b_w, age, W, IS_VARLEN)
            age += 1
            t = t0 + i + r - (W - 1)
            _store_row(p_dx, t, (t >= t0) & (t < end), SO_c, o_d, D_c, b_dx)
            b_past = b_x[: W - 1]
    CHANNELS: tl.constexpr = starts(D)
    column = _choose(i_c, CHANNELS, COLUMNS) + o_d
    _store_taps(dw_parts + i_bt.to(tl.int64) * (CHANNELS[-1] * W), column, m_d, b_dw, W, BD)

    # The last rows also get gradients from the rows behind the block, as far as their document goes.
    behind = t0 + tl.cdiv(rows, BR) * BR
    for r in tl.static_range(W - 1):
        b_new = _load_row(p_x, behind + r, last, S_c, o_d, D_c)
        b_dy = _load_row(p_dy, behind + r, last, D_c, o_d, D_c)
        b_x = _same_document(age, _with_past(b_new, b_past), W, IS_VARLEN)
        b_dz = _activation_gradient(_convolve(b_x, b_w, W), b_dy)
        b_dx, b_a = _scatter(b_dz, b_a, b_w, age, W, IS_VARLEN)
        age += 1
        t = behind + r - (W - 1)
        _store_row(p_dx, t, (t >= t0) & (t < end), SO_c, o_d, D_c, b_dx)
        b_past = b_x[: W - 1]
