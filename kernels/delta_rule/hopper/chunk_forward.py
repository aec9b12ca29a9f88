"""`chunk_forward` for Hopper, in Gluon: the same results from warps that each do a part of the work.

A program owns one sequence, one value head and 64 or 128 columns of values. Four warps per 64 columns carry the state
S^T [64, K] in registers and do nothing else. Four warps prepare what needs no state: P, and the vectors of gates, step
sizes and norms. One warp loads tiles with the TMA, as far ahead as there is memory. Per chunk, with N = beta Y:

    X = V - gamma r (K S)                 Y = X - C (beta X)
    S' = gamma_C S + K^T (rho r N)        O = scale gamma Q^ S + P N

Equations, roundings and arguments are those of `chunk_forward`. That kernel remains the readable form, and runs
all calls that this one is not made for (`Hopper.fits`).
"""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.launch import launch
from lrnn.kernels.common.tiles import Tiles
from lrnn.kernels.delta_rule.call import Call, Operands
from lrnn.kernels.delta_rule.hopper.parts import (
    FLAT,
    Buffer,
    OptionalBuffer,
    OptionalMatrix,
    OptionalPointer,
    aggregate,
    as_vector,
    inverse_step,
    last_steps,
    load_by_token,
    make_scan_barriers,
    part_barrier,
    step_and_back_prepared,
    store_by_token,
    tma_load,
    tma_store,
    token_tiles,
    weigh_keys,
)

FULL = 100  # sequences x value heads from which on a program each, with all 128 columns, fills an H100


class HopperLaunch(NamedTuple):
    """Halves of the values in a program, chunks in shared memory, registers of a thread that carries the second half's
    state and of one that prepares. The threads of the first half get the others."""

    HALVES: int
    STAGES: int
    STATE_REGISTERS: int
    PREPARE_REGISTERS: int


def fills_gpu(heads: int) -> bool:
    """Return whether a program for each of these sequences x value heads fills the GPU."""
    return heads >= FULL


def hopper_settings(full: bool, output: bool, save_states: bool, split: bool) -> HopperLaunch:
    """Return the settings, by whether a program per sequence and head fills the GPU, and by what it writes."""
    if not full:
        return HopperLaunch(1, 3, 0, 152)
    if not output:
        return HopperLaunch(2, 3, 192, 96)
    stages = 2 if save_states else 3  # three, with states and Y beside the output, would exceed the shared memory
    # With fewer registers for the state of a split one, ptxas waits for each product in turn.
    return HopperLaunch(2, stages, 208, 64) if split else HopperLaunch(2, stages, 200, 80)


LOADED = gl.constexpr(3)  # vectors that are loaded for each chunk
GATES, STEPS, LOG_RK = (gl.constexpr(n) for n in range(3))
PREPARED = gl.constexpr(6)  # vectors that are prepared for each chunk: gamma r, beta, 1 / beta, rho r beta, gamma_C and
GAMMA_R, BETA, INVERSE_BETA, RHO_R_BETA, GAMMA_C, TO_QUERY = (gl.constexpr(n) for n in range(6))  # scale gamma r_q


@aggregate
class Constants:
    """What the kernel is compiled for."""

    HV: gl.constexpr
    K: gl.constexpr
    V: gl.constexpr
    WIDTH: gl.constexpr  # columns of state, as in `chunk_forward`
    BT: gl.constexpr
    FACTORS: gl.constexpr
    HALVES: gl.constexpr
    STAGES: gl.constexpr
    NORMALIZE: gl.constexpr
    OUTPUT: gl.constexpr
    SAVE_STATES: gl.constexpr
    TRANSITION: gl.constexpr
    HAS_INITIAL: gl.constexpr
    SAVE_FINAL: gl.constexpr
    SPLIT: gl.constexpr


@aggregate
class Shared:
    """Shared memory of a program: loaded tiles of STAGES chunks, and prepared data of two chunks."""

    q: OptionalBuffer  # [STAGES, BT, K]
    k: Buffer  # [STAGES, BT, K]
    v: Buffer  # [STAGES * HALVES, BT, 64]
    c: Buffer  # [STAGES, BT, BT]
    vectors: Buffer  # [STAGES * LOADED, 1, BT]
    p: OptionalBuffer  # [2, BT, BT]
    prepared: Buffer  # [2 * PREPARED, BT]
    o: OptionalBuffer  # [HALVES, BT, 64]
    y: OptionalBuffer  # [HALVES, BT, 64]
    states: OptionalBuffer  # [HALVES, 64, K]

    @gluon.jit
    def loaded_vector(self, stage, number: gl.constexpr, BT: gl.constexpr):
        return as_vector(self.vectors.index(LOADED * stage + number), BT)

    @gluon.jit
    def prepared_vector(self, slot, number: gl.constexpr):
        return self.prepared.index(PREPARED * slot + number)


@aggregate
class Place:
    """The start of a program's sequence, value head and columns of values, and its number of chunks."""

    row: gl.tensor  # in Q, K, V, C, O and Y
    token: gl.tensor  # column in the vectors
    qk_column: gl.tensor
    v_column: gl.tensor
    c_column: gl.tensor
    vector_row: gl.tensor
    state_row: gl.tensor
    column: gl.tensor  # among the head's columns of state
    head_column: gl.tensor  # of the head in O and Y
    chunks: gl.tensor
    is_value: gl.tensor  # whether the columns are of values, not of the transition
    is_identity: gl.tensor  # whether the state begins as columns of the identity


@aggregate
class Results:
    """The memory from which the state's warps read the initial state, and to which they write."""

    o: OptionalMatrix
    y: OptionalMatrix
    states: OptionalMatrix
    p_initial: OptionalPointer
    p_final: OptionalPointer


@gluon.jit
def _load_tiles(q, k, v, c, vector_rows, shared, barriers, place, const):
    # One warp: tiles of every chunk, STAGES ahead, and those of Q and V, which are done with first, somewhat more.
    HALVES: gl.constexpr = const.HALVES
    size: gl.constexpr = (
        (q.block_type.nbytes if const.OUTPUT else 0) + k.block_type.nbytes + c.block_type.nbytes
        + HALVES * v.block_type.nbytes + LOADED * vector_rows.block_type.nbytes
    )  # fmt: skip
    for i in range(place.chunks):
        s = i % const.STAGES
        barriers.early.wait_for_previous(i)
        bar = barriers.ready.of(i)
        mbarrier.expect(bar, size)
        row = place.row + i * const.BT
        for j in gl.static_range(LOADED):
            tma_load(vector_rows, [place.vector_row + j, place.token + i * const.BT], bar,
                     shared.vectors.index(LOADED * s + j))  # fmt: skip
        for j in gl.static_range(HALVES):
            tma_load(v, [row, place.v_column + j * 64], bar, shared.v.index(HALVES * s + j))
        if const.OUTPUT:
            load_by_token(q, row, place.qk_column, bar, shared.q.index(s), const.FACTORS)
        barriers.free.wait_for_previous(i)
        tma_load(k, [row, place.qk_column], bar, shared.k.index(s))
        tma_load(c, [row, place.c_column], bar, shared.c.index(s))


@gluon.jit
def _prepare(shared, barriers, p_log_rq, log_scale, chunks, writes_norm, const):
    # Four warps: all that needs no state, up to two chunks ahead of it. That is P = scale tril(G . Q^ K^T r), log2 of
    # 1/|q|, and the vectors that the state's warps would otherwise compute in every row of theirs.
    BT: gl.constexpr = const.BT
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, tile)
    by_column: gl.constexpr = gl.SliceLayout(0, tile)
    rows = gl.arange(0, BT, by_row)
    columns = gl.arange(0, BT, by_column)
    for i in range(chunks):
        s = i % const.STAGES
        slot = i % 2
        barriers.ready.wait(i)
        g_tile = shared.loaded_vector(s, GATES, BT)
        log_rk_tile = shared.loaded_vector(s, LOG_RK, BT)
        g, log_rk = g_tile.load(by_row), log_rk_tile.load(by_row)
        beta = shared.loaded_vector(s, STEPS, BT).load(by_row)
        g_last = gl.sum(gl.where(rows == BT - 1, g, 0.0), 0)
        barriers.p_free.wait_for_previous(i)
        shared.prepared_vector(slot, GAMMA_R).store(gl.exp2(g + log_rk))
        shared.prepared_vector(slot, BETA).store(beta)
        shared.prepared_vector(slot, INVERSE_BETA).store(inverse_step(beta))
        shared.prepared_vector(slot, RHO_R_BETA).store(gl.exp2(g_last - g + log_rk) * beta)
        shared.prepared_vector(slot, GAMMA_C).store(gl.zeros([BT], gl.float32, by_row) + gl.exp2(g_last))
        if const.OUTPUT:
            # One product after the other: with both at once this part would need the registers of the state's.
            q_tile, to_query = shared.q.index(s), g + log_scale
            if const.NORMALIZE:  # |q|^2 is on the diagonal of Q Q^T
                qq = warpgroup_mma(q_tile, q_tile.permute((1, 0)), gl.zeros([BT, BT], gl.float32, tile), use_acc=False)
                qq = gl.sum(gl.where(rows[:, None] == columns[None, :], qq, 0.0), 1)
                log_rq = -0.5 * gl.log2(gl.maximum(qq, 1e-12))
                if writes_norm:
                    gl.store(p_log_rq + i * BT + rows, log_rq)
                to_query += log_rq
            shared.prepared_vector(slot, TO_QUERY).store(gl.exp2(to_query))
            from_key = g_tile.load(by_column) - log_rk_tile.load(by_column)
            last = last_steps(rows, const.FACTORS)
            p = weigh_keys(q_tile, shared.k.index(s), to_query, from_key, last, columns, tile, BT)
            shared.p.index(slot).store(p.to(shared.p.dtype))
            fence_async_shared()
        barriers.early.arrive(i)
        barriers.free.arrive(i)
        barriers.p_ready.arrive(i)


@gluon.jit
def _carry_state(results, shared, barriers, place, const, half: gl.constexpr):
    # Four warps: the state of 64 columns of values, its output, and the states and the errors of every chunk.
    OUTPUT: gl.constexpr = const.OUTPUT
    SAVE_STATES: gl.constexpr = const.SAVE_STATES
    BT: gl.constexpr = const.BT
    BV: gl.constexpr = 64
    K: gl.constexpr = const.K
    first = place.column + half * BV
    state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])  # S^T [BV, K]
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])  # [BV, BT]
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    left_of_state: gl.constexpr = gl.DotOperandLayout(0, state, 2)
    by_column: gl.constexpr = gl.SliceLayout(0, tile)
    dtype: gl.constexpr = shared.k.dtype
    c_dtype: gl.constexpr = shared.c.dtype

    o_v = first + gl.arange(0, BV, gl.SliceLayout(1, state))
    o_k = gl.arange(0, K, gl.SliceLayout(0, state))
    b_s = gl.zeros([BV, K], gl.float32, state)
    if const.HAS_INITIAL:
        b_s += gl.load(results.p_initial + o_k[None, :] * const.WIDTH + o_v[:, None]).to(gl.float32)
    if const.TRANSITION:
        b_s = gl.where(place.is_identity & (o_v[:, None] - (const.WIDTH - K) == o_k[None, :]), 1.0, b_s)

    for i in range(place.chunks):
        s = i % const.STAGES
        slot = i % 2
        b_sh = b_s.to(dtype)
        b_left = gl.convert_layout(b_sh, left)
        barriers.ready.wait(i)
        k_tile = shared.k.index(s)
        b_x = warpgroup_mma(b_left, k_tile.permute((1, 0)), gl.zeros([BV, BT], gl.float32, tile), use_acc=False,
                            is_async=True)  # fmt: skip
        if OUTPUT:
            b_o = warpgroup_mma(b_left, shared.q.index(s).permute((1, 0)), gl.zeros([BV, BT], gl.float32, tile),
                                use_acc=False, is_async=True)  # fmt: skip
        if SAVE_STATES:
            # While the products run. Stores end in order: the last state's has, those of the last O and Y may not have.
            tma.store_wait(2 if OUTPUT else 0)
            part_barrier()
            shared.states.index(half).store(b_sh)
            fence_async_shared()
            part_barrier()
            state_row = place.state_row + i * (const.HV * const.V)
            tma_store(results.states, [state_row + first, 0], shared.states.index(half))
        if OUTPUT:
            b_x, b_o = warpgroup_mma_wait(0, [b_x, b_o])
        else:
            b_x = warpgroup_mma_wait(0, [b_x])

        barriers.p_ready.wait(i)
        # X^T = V^T - (S^T K^T) gamma r
        b_v = shared.v.index(const.HALVES * s + half).permute((1, 0)).load(tile).to(gl.float32)
        barriers.early.arrive(i)
        if const.TRANSITION:
            b_v = gl.where(place.is_value, b_v, 0.0)
        b_x = b_v - b_x * shared.prepared_vector(slot, GAMMA_R).load(by_column)[None, :]
        beta_s, inverse_s = shared.prepared_vector(slot, BETA), shared.prepared_vector(slot, INVERSE_BETA)
        b_w, b_used, down = step_and_back_prepared(b_x, beta_s, inverse_s, c_dtype)
        # Y^T = X^T - (beta X)^T C^T
        b_y = warpgroup_mma(gl.convert_layout(-b_w, left), shared.c.index(s).permute((1, 0)), b_used, is_async=True)
        if OUTPUT and SAVE_STATES:
            tma.store_wait(1)  # the last O and Y are stored, this chunk's state may not be
            part_barrier()
        if OUTPUT:
            b_o = b_o * shared.prepared_vector(slot, TO_QUERY).load(by_column)[None, :]
        b_s = b_s * gl.max(shared.prepared_vector(slot, GAMMA_C).load(by_column), 0)
        b_y = warpgroup_mma_wait(0, [b_y])
        b_y = b_y * down[:, None]
        if SAVE_STATES:
            # Here, not behind the products that follow, for which its registers are needed.
            b_kept = b_y
            if c_dtype == gl.bfloat16:
                b_kept = b_y + (b_x - b_used)  # as in `chunk_forward`
            shared.y.index(half).permute((1, 0)).store(b_kept.to(dtype))
        # S'^T = gamma_C S^T + (rho r N)^T K
        rho = shared.prepared_vector(slot, RHO_R_BETA).load(by_column)
        b_n = b_y * rho[None, :]
        b_high = b_n.to(dtype)
        b_s = warpgroup_mma(gl.convert_layout(b_high, left_of_state), k_tile, b_s, is_async=True)
        if const.SPLIT:
            b_low = (b_n - b_high.to(gl.float32)).to(dtype)
            b_s = warpgroup_mma(gl.convert_layout(b_low, left_of_state), k_tile, b_s, is_async=True)
        if OUTPUT:
            # O^T = (S^T Q^T) scale gamma + N^T P^T
            b_n = gl.convert_layout((b_y * beta_s.load(by_column)[None, :]).to(dtype), left)
            b_o = warpgroup_mma(b_n, shared.p.index(slot).permute((1, 0)), b_o, is_async=True)
            b_s, b_o = warpgroup_mma_wait(0, [b_s, b_o])
        else:
            b_s = warpgroup_mma_wait(0, [b_s])
        barriers.p_free.arrive(i)
        barriers.free.arrive(i)
        if OUTPUT:
            if not SAVE_STATES:
                tma.store_wait(0)
                part_barrier()
            shared.o.index(half).permute((1, 0)).store(b_o.to(dtype))
        if OUTPUT or SAVE_STATES:
            fence_async_shared()
            part_barrier()
        if OUTPUT:
            store_by_token(
                results.o, place.row + i * BT, place.head_column + first, shared.o.index(half), const.FACTORS
            )
        if SAVE_STATES:
            tma_store(results.y, [place.row + i * BT, place.head_column + first], shared.y.index(half))
    tma.store_wait(0)
    if const.SAVE_FINAL:
        gl.store(results.p_final + o_k[None, :] * const.WIDTH + o_v[:, None], b_s)


@gluon.jit
def _allocate(q, k, v, c, o, y, states, vector_rows, const):
    STAGES: gl.constexpr = const.STAGES
    HALVES: gl.constexpr = const.HALVES
    BT: gl.constexpr = const.BT
    vec_layout: gl.constexpr = vector_rows.layout
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, BT, const.K], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [STAGES * HALVES, BT, 64], v.layout)
    c_s = gl.allocate_shared_memory(c.dtype, [STAGES, BT, BT], c.layout)
    vec_s = gl.allocate_shared_memory(gl.float32, [STAGES * LOADED, 1, BT], vec_layout)
    prepared_s = gl.allocate_shared_memory(gl.float32, [2 * PREPARED, BT], FLAT)
    q_s, p_s, o_s, y_s, state_s = None, None, None, None, None
    if const.OUTPUT:
        q_s = gl.allocate_shared_memory(q.dtype, [STAGES, BT, const.K], k.layout)
        p_s = gl.allocate_shared_memory(q.dtype, [2, BT, BT], c.layout)
        o_s = gl.allocate_shared_memory(o.dtype, [HALVES, BT, 64], v.layout)
    if const.SAVE_STATES:
        y_s = gl.allocate_shared_memory(y.dtype, [HALVES, BT, 64], y.layout)
        state_s = gl.allocate_shared_memory(states.dtype, [HALVES, 64, const.K], states.layout)
    return Shared(q_s, k_s, v_s, c_s, vec_s, p_s, prepared_s, o_s, y_s, state_s)


@gluon.jit(do_not_specialize=["T", "R", "scale"])
def chunk_forward_hopper_kernel(
    q, k, v, c, o, y, states, vectors, vector_rows, initial_state, final_state, reach, T, R, scale,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BT: gl.constexpr, FACTORS: gl.constexpr,
    HALVES: gl.constexpr, NORMALIZE: gl.constexpr, OUTPUT: gl.constexpr, SAVE_STATES: gl.constexpr,
    TRANSITION: gl.constexpr, HAS_INITIAL: gl.constexpr, SAVE_FINAL: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, STATE_REGISTERS: gl.constexpr, PREPARE_REGISTERS: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = V + K if TRANSITION else V
    BV: gl.constexpr = 64 * HALVES
    const = Constants(HV, K, V, WIDTH, BT, FACTORS, HALVES, STAGES, NORMALIZE, OUTPUT, SAVE_STATES, TRANSITION,
                      HAS_INITIAL, SAVE_FINAL, SPLIT)  # fmt: skip
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
    p_initial, p_final = None, None
    if HAS_INITIAL:
        p_initial = initial_state + (i_n * HV + i_h).to(gl.int64) * K * WIDTH
    if SAVE_FINAL:
        p_final = final_state + (i_n * HV + i_h).to(gl.int64) * K * WIDTH

    results = Results(o, y, states, p_initial, p_final)
    shared = _allocate(q, k, v, c, o, y, states, vector_rows, const)
    barriers = make_scan_barriers(STAGES, HALVES)
    state_row = (first_chunk * HV + i_h) * V
    p_log_rq, log_scale = p_g + 3 * R, gl.log2(scale)
    place = Place(row0, column0, qk_col, v_col, i_h * BT, 4 * i_h, state_row, i_v * BV, i_h * V, chunks, is_value,
                  is_identity)  # fmt: skip
    if HALVES == 2:
        gl.warp_specialize(
            [
                (_carry_state, (results, shared, barriers, place, const, 0)),
                (_carry_state, (results, shared, barriers, place, const, 1)),
                (_prepare, (shared, barriers, p_log_rq, log_scale, chunks, i_v == 0, const)),
                (_load_tiles, (q, k, v, c, vector_rows, shared, barriers, place, const)),
            ],
            [4, 4, 1],
            [STATE_REGISTERS, PREPARE_REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_carry_state, (results, shared, barriers, place, const, 0)),
                (_prepare, (shared, barriers, p_log_rq, log_scale, chunks, i_v == 0, const)),
                (_load_tiles, (q, k, v, c, vector_rows, shared, barriers, place, const)),
            ],
            [4, 1],
            [PREPARE_REGISTERS, 24],
        )  # fmt: skip


def launch_chunk_forward(
    call: Call,
    operands: Operands,
    initial: Tensor | None,
    final: Tensor | None,
    o: Tensor | None = None,
    y: Tensor | None = None,
    states: Tensor | None = None,
    reach: Tensor | None = None,
) -> None:
    """Launch the kernel, as `Backend.forward_scan` says."""
    heads = call.HV * call.chunks.sequences
    settings = hopper_settings(fills_gpu(heads), o is not None, states is not None, call.split)
    transition = reach is not None
    launch(
        chunk_forward_hopper_kernel,
        ((call.V + call.K * transition) // (64 * settings.HALVES) * heads, 1, 1),
        None if o is None else token_tiles(call, operands.queries, call.K),
        operands.k,
        operands.v,
        operands.c,
        None if o is None else token_tiles(call, o, call.columns),
        None if y is None else Tiles(y, CHUNK, call.columns),
        None if states is None else Tiles(states, call.columns, call.K),
        operands.vectors,
        operands.vector_rows,
        initial,
        final,
        reach,
        call.chunks.seq_len,
        call.R,
        call.scale,
        NORMALIZE=call.normalize_qk,
        OUTPUT=o is not None,
        SAVE_STATES=states is not None,
        TRANSITION=transition,
        HAS_INITIAL=initial is not None,
        SAVE_FINAL=final is not None,
        SPLIT=call.split,
        V=call.V,
        FACTORS=call.factors,
        num_warps=4,
        **settings._asdict(),
        **call.sizes,
    )
