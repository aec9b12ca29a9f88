"""`chunk_forward` for Hopper, in Gluon: the same results from warps that each do a part of the work.

A program owns one sequence, one value head and 64 or 128 columns of values. Four warps for every 64 columns carry the
state S^T [64, K] in registers and do nothing else; four prepare what needs no state (P, and the vectors of gates, step
sizes and norms); one loads tiles by the TMA, as far ahead as there is memory. Per chunk, with N = beta Y:

    X = V - gamma r (K S)                 Y = X - C (beta X)
    S' = gamma_C S + K^T (rho r N)        O = scale gamma Q^ S + P N

Equations, roundings and arguments are those of `chunk_forward`, which stays the readable form and does everything that
this one is not made for (`is_for_hopper`).
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lrnn.kernels.common.assembler import SAFE_PTXAS, ptxas_version
from lrnn.kernels.common.dispatch import INTERPRETED
from lrnn.kernels.delta_rule.hopper.parts import (
    FLAT,
    as_vector,
    inverse_step,
    make_barriers,
    part_barrier,
    step_and_back_prepared,
    tma_load,
    tma_store,
    weigh_keys,
)

FULL = 100  # sequences x value heads from which on a program each, with all 128 columns, fills an H100


class HopperLaunch(NamedTuple):
    """Halves of the values in a program, chunks in shared memory, registers of a thread that carries the second half's
    state and of one that prepares. The threads of the first half get what is left."""

    HALVES: int
    STAGES: int
    STATE_REGISTERS: int
    PREPARE_REGISTERS: int


def is_for_hopper(K: int, V: int, dtype: torch.dtype, is_full: bool, device: torch.device) -> bool:
    """Whether the kernels in Gluon are made for this: not for other GPUs, other head sizes than 128, float32, and
    sequences with a chunk that is not full. Nor for an assembler that may miscompile them: the plain ones have been
    tested with one, these have not."""
    if INTERPRETED or K != 128 or V != 128 or dtype == torch.float32 or not is_full:
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return ptxas_version() >= SAFE_PTXAS


def hopper_settings(full: bool, output: bool, save_states: bool, split: bool) -> HopperLaunch:
    """Settings where a program for every sequence and head fills the GPU or does not, by what it writes."""
    if not full:
        return HopperLaunch(1, 3, 0, 152)
    if not output:
        return HopperLaunch(2, 3, 192, 96)
    stages = 2 if save_states else 3  # three, with states and Y beside the output, would exceed the shared memory
    # With fewer registers for the state of a split one, ptxas waits for each product in turn.
    return HopperLaunch(2, stages, 208, 64) if split else HopperLaunch(2, stages, 200, 80)


@gluon.jit
def _load_tiles(
    q, k, v, c, vector_rows, tiles, origin, chunks, BT: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    OUTPUT: gl.constexpr,
):  # fmt: skip
    # one warp: tiles of every chunk, STAGES ahead; Q and V, which are done with first, somewhat more
    q_s, k_s, v_s, c_s, vec_s, p_s, ready_vec_s, o_s, y_s, state_s, ready, early, free, p_ready, p_free = tiles  # noqa: RUF059
    row0, column0, qk_col, v_col, c_col, vec_row = origin
    size: gl.constexpr = (
        (q.block_type.nbytes if OUTPUT else 0) + k.block_type.nbytes + c.block_type.nbytes
        + HALVES * v.block_type.nbytes + 3 * vector_rows.block_type.nbytes
    )  # fmt: skip
    for i in range(chunks):
        s = i % STAGES
        mbarrier.wait(early.index(s), ((i // STAGES) & 1) ^ 1)
        bar = ready.index(s)
        mbarrier.expect(bar, size)
        row = row0 + i * BT
        for j in gl.static_range(3):
            tma_load(vector_rows, [vec_row + j, column0 + i * BT], bar, vec_s.index(3 * s + j))
        for j in gl.static_range(HALVES):
            tma_load(v, [row, v_col + j * 64], bar, v_s.index(HALVES * s + j))
        if OUTPUT:
            tma_load(q, [row, qk_col], bar, q_s.index(s))
        mbarrier.wait(free.index(s), ((i // STAGES) & 1) ^ 1)
        tma_load(k, [row, qk_col], bar, k_s.index(s))
        tma_load(c, [row, c_col], bar, c_s.index(s))


@gluon.jit
def _prepare(
    tiles, p_log_rq, log_scale, chunks, writes_norm, BT: gl.constexpr, STAGES: gl.constexpr, NORMALIZE: gl.constexpr,
    OUTPUT: gl.constexpr,
):  # fmt: skip
    # four warps: all that needs no state, up to two chunks ahead of it. P = scale tril(G . Q^ K^T r), log2 of 1/|q|,
    # and the vectors that the state's warps would otherwise compute in every row of theirs
    q_s, k_s, v_s, c_s, vec_s, p_s, ready_vec_s, o_s, y_s, state_s, ready, early, free, p_ready, p_free = tiles  # noqa: RUF059
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, tile)
    by_column: gl.constexpr = gl.SliceLayout(0, tile)
    rows = gl.arange(0, BT, by_row)
    columns = gl.arange(0, BT, by_column)
    for i in range(chunks):
        s = i % STAGES
        slot = i % 2
        mbarrier.wait(ready.index(s), (i // STAGES) & 1)
        g_tile = as_vector(vec_s.index(3 * s), BT)
        log_rk_tile = as_vector(vec_s.index(3 * s + 2), BT)
        g, log_rk = g_tile.load(by_row), log_rk_tile.load(by_row)
        beta = as_vector(vec_s.index(3 * s + 1), BT).load(by_row)
        g_last = gl.sum(gl.where(rows == BT - 1, g, 0.0), 0)
        mbarrier.wait(p_free.index(slot), ((i // 2) & 1) ^ 1)
        first = 6 * slot
        ready_vec_s.index(first).store(gl.exp2(g + log_rk))  # gamma r
        ready_vec_s.index(first + 1).store(beta)
        ready_vec_s.index(first + 2).store(inverse_step(beta))
        ready_vec_s.index(first + 3).store(gl.exp2(g_last - g + log_rk) * beta)  # rho r beta
        ready_vec_s.index(first + 4).store(gl.zeros([BT], gl.float32, by_row) + gl.exp2(g_last))  # gamma_C
        if OUTPUT:
            # One product after the other: with both at once this part would need the registers of the state's.
            q_tile, to_query = q_s.index(s), g + log_scale
            if NORMALIZE:  # |q|^2 stands on the diagonal of Q Q^T
                qq = warpgroup_mma(q_tile, q_tile.permute((1, 0)), gl.zeros([BT, BT], gl.float32, tile), use_acc=False)
                qq = gl.sum(gl.where(rows[:, None] == columns[None, :], qq, 0.0), 1)
                log_rq = -0.5 * gl.log2(gl.maximum(qq, 1e-12))
                if writes_norm:
                    gl.store(p_log_rq + i * BT + rows, log_rq)
                to_query += log_rq
            ready_vec_s.index(first + 5).store(gl.exp2(to_query))  # scale gamma r_q
            from_key = g_tile.load(by_column) - log_rk_tile.load(by_column)
            p = weigh_keys(q_tile, k_s.index(s), to_query, from_key, rows, columns, tile, BT)
            p_s.index(slot).store(p.to(p_s.dtype))
            fence_async_shared()
        mbarrier.arrive(early.index(s), count=1)
        mbarrier.arrive(free.index(s), count=1)
        mbarrier.arrive(p_ready.index(slot), count=1)


@gluon.jit
def _carry_state(
    to_o, to_y, to_states, p_initial, p_final, tiles, places, half: gl.constexpr, BT: gl.constexpr, K: gl.constexpr,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr, OUTPUT: gl.constexpr, SAVE_STATES: gl.constexpr,
    HAS_INITIAL: gl.constexpr, SAVE_FINAL: gl.constexpr, TRANSITION: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    # four warps: the state of 64 columns of values, its output, and the states and the errors of every chunk
    q_s, k_s, v_s, c_s, vec_s, p_s, ready_vec_s, o_s, y_s, state_s, ready, early, free, p_ready, p_free = tiles  # noqa: RUF059
    row0, state_row, state_step, column, head_column, chunks, is_value, is_identity = places
    BV: gl.constexpr = 64
    first = column + half * BV
    state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])  # S^T [BV, K]
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])  # [BV, BT]
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    left_of_state: gl.constexpr = gl.DotOperandLayout(0, state, 2)
    by_column: gl.constexpr = gl.SliceLayout(0, tile)
    dtype: gl.constexpr = k_s.dtype
    c_dtype: gl.constexpr = c_s.dtype

    o_v = first + gl.arange(0, BV, gl.SliceLayout(1, state))
    o_k = gl.arange(0, K, gl.SliceLayout(0, state))
    b_s = gl.zeros([BV, K], gl.float32, state)
    if HAS_INITIAL:
        b_s += gl.load(p_initial + o_k[None, :] * WIDTH + o_v[:, None]).to(gl.float32)
    if TRANSITION:
        b_s = gl.where(is_identity & (o_v[:, None] - (WIDTH - K) == o_k[None, :]), 1.0, b_s)

    for i in range(chunks):
        s = i % STAGES
        slot = i % 2
        b_sh = b_s.to(dtype)
        b_left = gl.convert_layout(b_sh, left)
        mbarrier.wait(ready.index(s), (i // STAGES) & 1)
        k_tile = k_s.index(s)
        b_x = warpgroup_mma(b_left, k_tile.permute((1, 0)), gl.zeros([BV, BT], gl.float32, tile), use_acc=False,
                            is_async=True)  # fmt: skip
        if OUTPUT:
            b_o = warpgroup_mma(b_left, q_s.index(s).permute((1, 0)), gl.zeros([BV, BT], gl.float32, tile),
                                use_acc=False, is_async=True)  # fmt: skip
        if SAVE_STATES:
            # While the products run. Stores end in order: the last state's has, those of the last O and Y may not have.
            tma.store_wait(2 if OUTPUT else 0)
            part_barrier()
            state_s.index(half).store(b_sh)
            fence_async_shared()
            part_barrier()
            tma_store(to_states, [state_row + i * state_step + first, 0], state_s.index(half))
        if OUTPUT:
            b_x, b_o = warpgroup_mma_wait(0, [b_x, b_o])
        else:
            b_x = warpgroup_mma_wait(0, [b_x])

        mbarrier.wait(p_ready.index(slot), (i // 2) & 1)
        # X^T = V^T - (S^T K^T) gamma r
        b_v = v_s.index(HALVES * s + half).permute((1, 0)).load(tile).to(gl.float32)
        mbarrier.arrive(early.index(s), count=1)
        if TRANSITION:
            b_v = gl.where(is_value, b_v, 0.0)
        b_x = b_v - b_x * ready_vec_s.index(6 * slot).load(by_column)[None, :]
        beta_s, inverse_s = ready_vec_s.index(6 * slot + 1), ready_vec_s.index(6 * slot + 2)
        b_w, b_used, down = step_and_back_prepared(b_x, beta_s, inverse_s, c_dtype)
        # Y^T = X^T - (beta X)^T C^T
        b_y = warpgroup_mma(gl.convert_layout(-b_w, left), c_s.index(s).permute((1, 0)), b_used, is_async=True)
        if OUTPUT and SAVE_STATES:
            tma.store_wait(1)  # the last O and Y are stored, this chunk's state may not be
            part_barrier()
        if OUTPUT:
            b_o = b_o * ready_vec_s.index(6 * slot + 5).load(by_column)[None, :]
        b_s = b_s * gl.max(ready_vec_s.index(6 * slot + 4).load(by_column), 0)
        b_y = warpgroup_mma_wait(0, [b_y])
        b_y = b_y * down[:, None]
        if SAVE_STATES:
            # Here, not behind the products that follow, for which its registers are needed.
            b_kept = b_y
            if c_dtype == gl.bfloat16:
                b_kept = b_y + (b_x - b_used)  # as in `chunk_forward`
            y_s.index(half).permute((1, 0)).store(b_kept.to(dtype))
        # S'^T = gamma_C S^T + (rho r N)^T K
        rho = ready_vec_s.index(6 * slot + 3).load(by_column)
        b_n = b_y * rho[None, :]
        b_high = b_n.to(dtype)
        b_s = warpgroup_mma(gl.convert_layout(b_high, left_of_state), k_tile, b_s, is_async=True)
        if SPLIT:
            b_low = (b_n - b_high.to(gl.float32)).to(dtype)
            b_s = warpgroup_mma(gl.convert_layout(b_low, left_of_state), k_tile, b_s, is_async=True)
        if OUTPUT:
            # O^T = (S^T Q^T) scale gamma + N^T P^T
            b_n = gl.convert_layout((b_y * beta_s.load(by_column)[None, :]).to(dtype), left)
            b_o = warpgroup_mma(b_n, p_s.index(slot).permute((1, 0)), b_o, is_async=True)
            b_s, b_o = warpgroup_mma_wait(0, [b_s, b_o])
        else:
            b_s = warpgroup_mma_wait(0, [b_s])
        mbarrier.arrive(p_free.index(slot), count=1)
        mbarrier.arrive(free.index(s), count=1)
        if OUTPUT:
            if not SAVE_STATES:
                tma.store_wait(0)
                part_barrier()
            o_s.index(half).permute((1, 0)).store(b_o.to(dtype))
        if OUTPUT or SAVE_STATES:
            fence_async_shared()
            part_barrier()
        if OUTPUT:
            tma_store(to_o, [row0 + i * BT, head_column + first], o_s.index(half))
        if SAVE_STATES:
            tma_store(to_y, [row0 + i * BT, head_column + first], y_s.index(half))
    tma.store_wait(0)
    if SAVE_FINAL:
        gl.store(p_final + o_k[None, :] * WIDTH + o_v[:, None], b_s)


@gluon.jit(do_not_specialize=["T", "R", "scale"])
def chunk_forward_hopper_kernel(
    q, k, v, c, o, y, states, vectors, vector_rows, initial_state, final_state, reach, T, R, scale,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BT: gl.constexpr, HALVES: gl.constexpr,
    NORMALIZE: gl.constexpr, OUTPUT: gl.constexpr, SAVE_STATES: gl.constexpr, TRANSITION: gl.constexpr,
    HAS_INITIAL: gl.constexpr, SAVE_FINAL: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
    STATE_REGISTERS: gl.constexpr, PREPARE_REGISTERS: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = V + K if TRANSITION else V  # columns of state, as in `chunk_forward`
    BV: gl.constexpr = 64 * HALVES
    pid = gl.program_id(0)
    i_v = pid % (WIDTH // BV)
    i_h = (pid // (WIDTH // BV)) % HV
    i_n = pid // (WIDTH // BV * HV)
    is_value = i_v < V // BV
    row0 = i_n * T
    chunks = T // BT
    first_chunk = i_n * chunks
    column0 = first_chunk * BT
    is_identity = i_v >= V // BV
    if TRANSITION:  # as in `chunk_forward`, from the chunk that `reach` names
        first = gl.load(reach + 3 * (i_n * HV + i_h) + gl.where(is_value, 0, 1))
        is_identity &= first == 0
        row0 += first * BT
        column0 += first * BT
        chunks -= first
    qk_col = i_h // (HV // H) * K
    v_col = i_h * V + gl.where(is_value, i_v, 0) * BV
    p_g = vectors + 4 * i_h.to(gl.int64) * R + column0
    # Tuples hold no None, so something else stands for what is not needed.
    p_initial = initial_state + (i_n * HV + i_h).to(gl.int64) * K * WIDTH if HAS_INITIAL else p_g
    p_final = final_state + (i_n * HV + i_h).to(gl.int64) * K * WIDTH if SAVE_FINAL else p_g
    to_o, to_y, to_states = o if OUTPUT else v, y if SAVE_STATES else v, states if SAVE_STATES else k

    vec_layout: gl.constexpr = vector_rows.layout
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, BT, K], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [STAGES * HALVES, BT, 64], v.layout)
    c_s = gl.allocate_shared_memory(c.dtype, [STAGES, BT, BT], c.layout)
    vec_s = gl.allocate_shared_memory(gl.float32, [STAGES * 3, 1, BT], vec_layout)
    q_s, p_s, o_s, y_s, state_s = k_s, c_s, v_s, v_s, k_s  # stand for what is not needed
    ready_vec_s = gl.allocate_shared_memory(gl.float32, [2 * 6, BT], FLAT)
    if OUTPUT:
        q_s = gl.allocate_shared_memory(q.dtype, [STAGES, BT, K], q.layout)
        p_s = gl.allocate_shared_memory(q.dtype, [2, BT, BT], c.layout)
        o_s = gl.allocate_shared_memory(o.dtype, [HALVES, BT, 64], o.layout)
    if SAVE_STATES:
        y_s = gl.allocate_shared_memory(y.dtype, [HALVES, BT, 64], y.layout)
        state_s = gl.allocate_shared_memory(states.dtype, [HALVES, 64, K], states.layout)
    ready, early, free, p_ready, p_free = make_barriers(STAGES, HALVES)

    state_row = (first_chunk * HV + i_h) * V
    tiles = (q_s, k_s, v_s, c_s, vec_s, p_s, ready_vec_s, o_s, y_s, state_s, ready, early, free, p_ready, p_free)
    from_q, p_log_rq, log_scale = q if OUTPUT else k, p_g + 3 * R, gl.log2(scale)
    origin = (row0, column0, qk_col, v_col, i_h * BT, 4 * i_h)
    places = (row0, state_row, HV * V, i_v * BV, i_h * V, chunks, is_value, is_identity)
    # Tuples that are assigned turn constants into tensors, so these are written where they are used.
    if HALVES == 2:
        gl.warp_specialize(
            [
                (_carry_state, (to_o, to_y, to_states, p_initial, p_final, tiles, places, 0, BT, K, WIDTH, STAGES,
                                HALVES, OUTPUT, SAVE_STATES, HAS_INITIAL, SAVE_FINAL, TRANSITION, SPLIT)),
                (_carry_state, (to_o, to_y, to_states, p_initial, p_final, tiles, places, 1, BT, K, WIDTH, STAGES,
                                HALVES, OUTPUT, SAVE_STATES, HAS_INITIAL, SAVE_FINAL, TRANSITION, SPLIT)),
                (_prepare, (tiles, p_log_rq, log_scale, chunks, i_v == 0, BT, STAGES, NORMALIZE, OUTPUT)),
                (_load_tiles, (from_q, k, v, c, vector_rows, tiles, origin, chunks, BT, STAGES, HALVES, OUTPUT)),
            ],
            [4, 4, 1],
            [STATE_REGISTERS, PREPARE_REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_carry_state, (to_o, to_y, to_states, p_initial, p_final, tiles, places, 0, BT, K, WIDTH, STAGES,
                                HALVES, OUTPUT, SAVE_STATES, HAS_INITIAL, SAVE_FINAL, TRANSITION, SPLIT)),
                (_prepare, (tiles, p_log_rq, log_scale, chunks, i_v == 0, BT, STAGES, NORMALIZE, OUTPUT)),
                (_load_tiles, (from_q, k, v, c, vector_rows, tiles, origin, chunks, BT, STAGES, HALVES, OUTPUT)),
            ],
            [4, 1],
            [PREPARE_REGISTERS, 24],
        )  # fmt: skip
