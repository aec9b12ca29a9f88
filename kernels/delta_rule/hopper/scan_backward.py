"""`chunk_scan_backward` for Hopper, in Gluon: the same results from warps that each do a part of the work.

The parts are those of `chunk_forward_hopper`: four warps for every 64 columns of values carry the gradient dS'^T of the
state that leaves a chunk, four prepare what needs no state, one loads. Per chunk, from the last to the first:

    dN = rho r (K dS') + P^T dO        dW = dN - C^T (beta dN)
    dS = gamma_C dS' + Q^^T (scale gamma dO) - K^T (gamma r beta dW)

The second term of dS needs nothing of this chunk's chain and is computed at its beginning. Equations, roundings and
arguments are those of `chunk_scan_backward`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lrnn.kernels.delta_rule.hopper.chunk_forward import HopperLaunch
from lrnn.kernels.delta_rule.hopper.parts import (
    FLAT,
    as_vector,
    inverse_step,
    is_kept_small,
    make_barriers,
    part_barrier,
    step_and_back_prepared,
    tma_load,
    tma_store,
    weigh_keys,
)

VECTORS = gl.constexpr(7)  # that are prepared for each chunk


def hopper_backward_settings(full: bool, save_states: bool) -> HopperLaunch:
    """Settings as `hopper_settings` gives them for the forward scan."""
    return HopperLaunch(2, 2 if save_states else 3, 200, 80) if full else HopperLaunch(1, 3, 0, 152)


@gluon.jit
def _load_tiles(
    q, k, c, do, vector_rows, tiles, origin, chunks, BT: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr
):
    # one warp: tiles of every chunk, STAGES ahead; Q and dO, which are done with first, somewhat more
    q_s, k_s, c_s, do_s, vec_s, p_s, ready_vec_s, dv_s, state_s, ready, early, free, p_ready, p_free = tiles  # noqa: RUF059
    row0, column0, qk_col, v_col, c_col, vec_row = origin
    size: gl.constexpr = (
        q.block_type.nbytes + k.block_type.nbytes + c.block_type.nbytes + HALVES * do.block_type.nbytes
        + 4 * vector_rows.block_type.nbytes
    )  # fmt: skip
    for i in range(chunks):
        s = i % STAGES
        i_t = chunks - 1 - i
        mbarrier.wait(early.index(s), ((i // STAGES) & 1) ^ 1)
        bar = ready.index(s)
        mbarrier.expect(bar, size)
        row = row0 + i_t * BT
        tma_load(q, [row, qk_col], bar, q_s.index(s))
        for j in gl.static_range(4):
            tma_load(vector_rows, [vec_row + j, column0 + i_t * BT], bar, vec_s.index(4 * s + j))
        for j in gl.static_range(HALVES):
            tma_load(do, [row, v_col + j * 64], bar, do_s.index(HALVES * s + j))
        mbarrier.wait(free.index(s), ((i // STAGES) & 1) ^ 1)
        tma_load(k, [row, qk_col], bar, k_s.index(s))
        tma_load(c, [row, c_col], bar, c_s.index(s))


@gluon.jit
def _prepare(tiles, log_scale, chunks, BT: gl.constexpr, STAGES: gl.constexpr):
    # four warps: P, and the vectors that the state's warps would otherwise compute in every row of theirs
    q_s, k_s, c_s, do_s, vec_s, p_s, ready_vec_s, dv_s, state_s, ready, early, free, p_ready, p_free = tiles  # noqa: RUF059
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, tile)
    by_column: gl.constexpr = gl.SliceLayout(0, tile)
    rows = gl.arange(0, BT, by_row)
    columns = gl.arange(0, BT, by_column)
    for i in range(chunks):
        s = i % STAGES
        slot = i % 2
        mbarrier.wait(ready.index(s), (i // STAGES) & 1)
        g_tile = as_vector(vec_s.index(4 * s), BT)
        log_rk_tile = as_vector(vec_s.index(4 * s + 2), BT)
        g, log_rk = g_tile.load(by_row), log_rk_tile.load(by_row)
        beta = as_vector(vec_s.index(4 * s + 1), BT).load(by_row)
        to_query = g + as_vector(vec_s.index(4 * s + 3), BT).load(by_row) + log_scale
        g_last = gl.sum(gl.where(rows == BT - 1, g, 0.0), 0)
        mbarrier.wait(p_free.index(slot), ((i // 2) & 1) ^ 1)
        first = VECTORS * slot
        ready_vec_s.index(first).store(gl.exp2(g_last - g + log_rk))  # rho r
        ready_vec_s.index(first + 1).store(beta)
        ready_vec_s.index(first + 2).store(inverse_step(beta))
        ready_vec_s.index(first + 3).store(-gl.exp2(g + log_rk) * beta)  # -gamma r beta
        ready_vec_s.index(first + 4).store(gl.zeros([BT], gl.float32, by_row) + gl.exp2(g_last))  # gamma_C
        ready_vec_s.index(first + 5).store(gl.exp2(to_query))  # scale gamma r_q
        ready_vec_s.index(first + 6).store(gl.where(is_kept_small(beta, k_s.dtype), 1.0, beta))
        from_key = g_tile.load(by_column) - log_rk_tile.load(by_column)
        p = weigh_keys(q_s.index(s), k_s.index(s), to_query, from_key, rows, columns, tile, BT)
        p_s.index(slot).store(p.to(p_s.dtype))
        fence_async_shared()
        mbarrier.arrive(early.index(s), count=1)
        mbarrier.arrive(free.index(s), count=1)
        mbarrier.arrive(p_ready.index(slot), count=1)


@gluon.jit
def _carry_gradient(
    to_dv, to_dstates, p_final, p_initial, tiles, places, half: gl.constexpr, BT: gl.constexpr, K: gl.constexpr,
    V: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr, SAVE_STATES: gl.constexpr, HAS_FINAL: gl.constexpr,
    SAVE_INITIAL: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    # four warps: the gradient of the state of 64 columns of values
    q_s, k_s, c_s, do_s, vec_s, p_s, ready_vec_s, dv_s, state_s, ready, early, free, p_ready, p_free = tiles  # noqa: RUF059
    row0, state_row, state_step, column, head_column, chunks = places
    BV: gl.constexpr = 64
    first = column + half * BV
    state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])  # dS'^T [BV, K]
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])  # [BV, BT]
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    left_of_state: gl.constexpr = gl.DotOperandLayout(0, state, 2)
    by_column: gl.constexpr = gl.SliceLayout(0, tile)
    dtype: gl.constexpr = k_s.dtype
    c_dtype: gl.constexpr = c_s.dtype

    o_v = first + gl.arange(0, BV, gl.SliceLayout(1, state))
    o_k = gl.arange(0, K, gl.SliceLayout(0, state))
    b_ds = gl.zeros([BV, K], gl.float32, state)
    if HAS_FINAL:
        b_ds += gl.load(p_final + o_k[None, :] * V + o_v[:, None]).to(gl.float32)

    for i in range(chunks):
        s = i % STAGES
        slot = i % 2
        i_t = chunks - 1 - i
        b_dsh = b_ds.to(dtype)
        mbarrier.wait(ready.index(s), (i // STAGES) & 1)
        k_tile = k_s.index(s)
        b_dn = warpgroup_mma(gl.convert_layout(b_dsh, left), k_tile.permute((1, 0)),
                             gl.zeros([BV, BT], gl.float32, tile), use_acc=False, is_async=True)  # fmt: skip
        mbarrier.wait(p_ready.index(slot), (i // 2) & 1)
        b_do = do_s.index(HALVES * s + half).permute((1, 0)).load(tile)
        # dS^T = gamma_C dS'^T + (scale gamma dO)^T Q^ - (gamma r beta dW)^T K
        b_ds = b_ds * gl.max(ready_vec_s.index(VECTORS * slot + 4).load(by_column), 0)
        gamma = ready_vec_s.index(VECTORS * slot + 5).load(by_column)
        b_doq = gl.convert_layout((b_do.to(gl.float32) * gamma[None, :]).to(dtype), left_of_state)
        b_ds = warpgroup_mma(b_doq, q_s.index(s), b_ds, is_async=True)
        if SAVE_STATES:
            tma.store_wait(0)
            part_barrier()
            state_s.index(half).store(b_dsh)
            fence_async_shared()
            part_barrier()
            tma_store(to_dstates, [state_row + i_t * state_step + first, 0], state_s.index(half))
        # dN^T = (dS'^T K^T) rho r + dO^T P
        b_dn = warpgroup_mma_wait(1, [b_dn])
        b_dn = b_dn * ready_vec_s.index(VECTORS * slot).load(by_column)[None, :]
        b_dn = warpgroup_mma(gl.convert_layout(b_do, left), p_s.index(slot), b_dn, is_async=True)
        b_dn, b_ds = warpgroup_mma_wait(0, [b_dn, b_ds])
        mbarrier.arrive(early.index(s), count=1)
        # dW^T = dN^T - (beta dN)^T C
        beta_s, inverse_s = ready_vec_s.index(VECTORS * slot + 1), ready_vec_s.index(VECTORS * slot + 2)
        b_z, b_used, down = step_and_back_prepared(b_dn, beta_s, inverse_s, c_dtype)
        b_dw = warpgroup_mma(gl.convert_layout(-b_z, left), c_s.index(s), b_used, is_async=True)
        b_dw = warpgroup_mma_wait(0, [b_dw])
        b_dw = b_dw * down[:, None]
        b_du = b_dw * ready_vec_s.index(VECTORS * slot + 3).load(by_column)[None, :]
        b_high = b_du.to(dtype)
        b_ds = warpgroup_mma(gl.convert_layout(b_high, left_of_state), k_tile, b_ds, is_async=True)
        if SPLIT:
            b_low = (b_du - b_high.to(gl.float32)).to(dtype)
            b_ds = warpgroup_mma(gl.convert_layout(b_low, left_of_state), k_tile, b_ds, is_async=True)
        if SAVE_STATES:
            if c_dtype == gl.bfloat16:
                b_dw += b_dn - b_used  # as in `chunk_scan_backward`
            b_dw = b_dw * ready_vec_s.index(VECTORS * slot + 6).load(by_column)[None, :]
            dv_s.index(half).permute((1, 0)).store(b_dw.to(dtype))
            fence_async_shared()
            part_barrier()
            tma_store(to_dv, [row0 + i_t * BT, head_column + first], dv_s.index(half))
        b_ds = warpgroup_mma_wait(0, [b_ds])
        mbarrier.arrive(p_free.index(slot), count=1)
        mbarrier.arrive(free.index(s), count=1)
    tma.store_wait(0)
    if SAVE_INITIAL:
        gl.store(p_initial + o_k[None, :] * V + o_v[:, None], b_ds)


@gluon.jit(do_not_specialize=["T", "R", "scale"])
def chunk_scan_backward_hopper_kernel(
    q, k, c, do, dv, dstates, vectors, vector_rows, dfinal, dinitial, reach, T, R, scale,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BT: gl.constexpr, SAVE_STATES: gl.constexpr,
    HAS_FINAL: gl.constexpr, SAVE_INITIAL: gl.constexpr, REACH: gl.constexpr, SPLIT: gl.constexpr,
    HALVES: gl.constexpr, STAGES: gl.constexpr, STATE_REGISTERS: gl.constexpr, PREPARE_REGISTERS: gl.constexpr,
):  # fmt: skip
    BV: gl.constexpr = 64 * HALVES
    pid = gl.program_id(0)
    i_v = pid % (V // BV)
    i_h = (pid // (V // BV)) % HV
    i_n = pid // (V // BV * HV)
    row0 = i_n * T
    chunks = T // BT
    first_chunk = i_n * chunks
    if REACH:  # as in `chunk_scan_backward`
        chunks = gl.load(reach + 3 * (i_n * HV + i_h) + 2)
    # Tuples hold no None, so something else stands for what is not needed.
    p_state = (i_n * HV + i_h).to(gl.int64) * K * V
    p_final = dfinal + p_state if HAS_FINAL else vectors
    p_initial = dinitial + p_state if SAVE_INITIAL else vectors
    to_dv, to_dstates = dv if SAVE_STATES else do, dstates if SAVE_STATES else k

    q_s = gl.allocate_shared_memory(q.dtype, [STAGES, BT, K], q.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, BT, K], k.layout)
    c_s = gl.allocate_shared_memory(c.dtype, [STAGES, BT, BT], c.layout)
    do_s = gl.allocate_shared_memory(do.dtype, [STAGES * HALVES, BT, 64], do.layout)
    vec_s = gl.allocate_shared_memory(gl.float32, [STAGES * 4, 1, BT], vector_rows.layout)
    p_s = gl.allocate_shared_memory(q.dtype, [2, BT, BT], c.layout)
    ready_vec_s = gl.allocate_shared_memory(gl.float32, [2 * VECTORS, BT], FLAT)
    dv_s, state_s = do_s, k_s  # stand for what is not needed
    if SAVE_STATES:
        dv_s = gl.allocate_shared_memory(dv.dtype, [HALVES, BT, 64], dv.layout)
        state_s = gl.allocate_shared_memory(dstates.dtype, [HALVES, 64, K], dstates.layout)
    ready, early, free, p_ready, p_free = make_barriers(STAGES, HALVES)

    tiles = (q_s, k_s, c_s, do_s, vec_s, p_s, ready_vec_s, dv_s, state_s, ready, early, free, p_ready, p_free)
    origin = (row0, first_chunk * BT, i_h // (HV // H) * K, i_h * V + i_v * BV, i_h * BT, 4 * i_h)
    places = (row0, (first_chunk * HV + i_h) * V, HV * V, i_v * BV, i_h * V, chunks)
    log_scale = gl.log2(scale)
    # Tuples that are assigned turn constants into tensors, so these are written where they are used.
    if HALVES == 2:
        gl.warp_specialize(
            [
                (_carry_gradient, (to_dv, to_dstates, p_final, p_initial, tiles, places, 0, BT, K, V, STAGES, HALVES,
                                   SAVE_STATES, HAS_FINAL, SAVE_INITIAL, SPLIT)),
                (_carry_gradient, (to_dv, to_dstates, p_final, p_initial, tiles, places, 1, BT, K, V, STAGES, HALVES,
                                   SAVE_STATES, HAS_FINAL, SAVE_INITIAL, SPLIT)),
                (_prepare, (tiles, log_scale, chunks, BT, STAGES)),
                (_load_tiles, (q, k, c, do, vector_rows, tiles, origin, chunks, BT, STAGES, HALVES)),
            ],
            [4, 4, 1],
            [STATE_REGISTERS, PREPARE_REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_carry_gradient, (to_dv, to_dstates, p_final, p_initial, tiles, places, 0, BT, K, V, STAGES, HALVES,
                                   SAVE_STATES, HAS_FINAL, SAVE_INITIAL, SPLIT)),
                (_prepare, (tiles, log_scale, chunks, BT, STAGES)),
                (_load_tiles, (q, k, c, do, vector_rows, tiles, origin, chunks, BT, STAGES, HALVES)),
            ],
            [4, 1],
            [PREPARE_REGISTERS, 24],
        )  # fmt: skip
