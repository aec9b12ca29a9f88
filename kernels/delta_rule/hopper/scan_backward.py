"""`chunk_scan_backward` for Hopper, in Gluon: the same results from warps that each do a part of the work.

The parts are those of `hopper.chunk_forward`. Four warps per 64 columns of values carry the gradient dS'^T of the state
that leaves a chunk, four prepare what needs no state, one loads. Per chunk, from the last to the first:

    dN = rho r (K dS') + P^T dO        dW = dN - C^T (beta dN)
    dS = gamma_C dS' + Q^^T (scale gamma dO) - K^T (gamma r beta dW)

The second term of dS needs nothing of this chunk's chain and is computed first. Equations, roundings and arguments are
those of `chunk_scan_backward`.
"""

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
from lrnn.kernels.delta_rule.hopper.chunk_forward import HopperLaunch, fills_gpu
from lrnn.kernels.delta_rule.hopper.parts import (
    FLAT,
    Buffer,
    OptionalBuffer,
    OptionalMatrix,
    OptionalPointer,
    aggregate,
    as_vector,
    inverse_step,
    is_kept_small,
    last_steps,
    load_by_token,
    make_scan_barriers,
    part_barrier,
    step_and_back_prepared,
    tma_load,
    tma_store,
    token_tiles,
    weigh_keys,
)

LOADED = gl.constexpr(4)  # vectors that are loaded for each chunk
GATES, STEPS, LOG_RK, LOG_RQ = (gl.constexpr(n) for n in range(4))
PREPARED = gl.constexpr(7)  # vectors that are prepared for each chunk
RHO_R, BETA, INVERSE_BETA, MINUS_GAMMA_R_BETA, GAMMA_C, TO_QUERY, KEPT = (gl.constexpr(n) for n in range(7))


def hopper_backward_settings(full: bool, save_states: bool) -> HopperLaunch:
    """Return the settings, as `hopper_settings` does for the forward scan."""
    return HopperLaunch(2, 2 if save_states else 3, 200, 80) if full else HopperLaunch(1, 3, 0, 152)


@aggregate
class Constants:
    """What the kernel is compiled for."""

    HV: gl.constexpr
    K: gl.constexpr
    V: gl.constexpr
    BT: gl.constexpr
    FACTORS: gl.constexpr
    HALVES: gl.constexpr
    STAGES: gl.constexpr
    SAVE_STATES: gl.constexpr
    HAS_FINAL: gl.constexpr
    SAVE_INITIAL: gl.constexpr
    SPLIT: gl.constexpr


@aggregate
class Shared:
    """Shared memory of a program: loaded tiles of STAGES chunks, and prepared data of two chunks."""

    q: Buffer  # [STAGES, BT, K]
    k: Buffer  # [STAGES, BT, K]
    c: Buffer  # [STAGES, BT, BT]
    do: Buffer  # [STAGES * HALVES, BT, 64]
    vectors: Buffer  # [STAGES * LOADED, 1, BT]
    p: Buffer  # [2, BT, BT]
    prepared: Buffer  # [2 * PREPARED, BT]
    dv: OptionalBuffer  # [HALVES, BT, 64]
    dstates: OptionalBuffer  # [HALVES, 64, K]

    @gluon.jit
    def loaded_vector(self, stage, number: gl.constexpr, BT: gl.constexpr):
        return as_vector(self.vectors.index(LOADED * stage + number), BT)

    @gluon.jit
    def prepared_vector(self, slot, number: gl.constexpr):
        return self.prepared.index(PREPARED * slot + number)


@aggregate
class Place:
    """The start of a program's sequence, value head and columns of values, and its number of chunks."""

    row: gl.tensor  # in Q, K, C, dO and dV
    token: gl.tensor  # column in the vectors
    qk_column: gl.tensor
    v_column: gl.tensor
    c_column: gl.tensor
    vector_row: gl.tensor
    state_row: gl.tensor
    column: gl.tensor  # among the head's columns of values
    head_column: gl.tensor  # of the head in dV
    chunks: gl.tensor


@aggregate
class Results:
    """The memory from which the state's warps read the final gradient, and to which they write."""

    dv: OptionalMatrix
    dstates: OptionalMatrix
    p_final: OptionalPointer
    p_initial: OptionalPointer


@gluon.jit
def _load_tiles(q, k, c, do, vector_rows, shared, barriers, place, const):
    # One warp: tiles of every chunk, STAGES ahead, and those of Q and dO, which are done with first, somewhat more.
    HALVES: gl.constexpr = const.HALVES
    size: gl.constexpr = (
        q.block_type.nbytes + k.block_type.nbytes + c.block_type.nbytes + HALVES * do.block_type.nbytes
        + LOADED * vector_rows.block_type.nbytes
    )  # fmt: skip
    for i in range(place.chunks):
        s = i % const.STAGES
        i_t = place.chunks - 1 - i
        barriers.early.wait_for_previous(i)
        bar = barriers.ready.of(i)
        mbarrier.expect(bar, size)
        row = place.row + i_t * const.BT
        load_by_token(q, row, place.qk_column, bar, shared.q.index(s), const.FACTORS)
        for j in gl.static_range(LOADED):
            tma_load(vector_rows, [place.vector_row + j, place.token + i_t * const.BT], bar,
                     shared.vectors.index(LOADED * s + j))  # fmt: skip
        for j in gl.static_range(HALVES):
            load_by_token(do, row, place.v_column + j * 64, bar, shared.do.index(HALVES * s + j), const.FACTORS)
        barriers.free.wait_for_previous(i)
        tma_load(k, [row, place.qk_column], bar, shared.k.index(s))
        tma_load(c, [row, place.c_column], bar, shared.c.index(s))


@gluon.jit
def _prepare(shared, barriers, log_scale, chunks, const):
    # Four warps: P, and the vectors that the state's warps would otherwise compute in every row of theirs.
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
        to_query = g + shared.loaded_vector(s, LOG_RQ, BT).load(by_row) + log_scale
        g_last = gl.sum(gl.where(rows == BT - 1, g, 0.0), 0)
        barriers.p_free.wait_for_previous(i)
        shared.prepared_vector(slot, RHO_R).store(gl.exp2(g_last - g + log_rk))
        shared.prepared_vector(slot, BETA).store(beta)
        shared.prepared_vector(slot, INVERSE_BETA).store(inverse_step(beta))
        shared.prepared_vector(slot, MINUS_GAMMA_R_BETA).store(-gl.exp2(g + log_rk) * beta)
        shared.prepared_vector(slot, GAMMA_C).store(gl.zeros([BT], gl.float32, by_row) + gl.exp2(g_last))
        shared.prepared_vector(slot, TO_QUERY).store(gl.exp2(to_query))  # scale gamma r_q
        shared.prepared_vector(slot, KEPT).store(gl.where(is_kept_small(beta, shared.k.dtype), 1.0, beta))
        from_key = g_tile.load(by_column) - log_rk_tile.load(by_column)
        last = last_steps(rows, const.FACTORS)
        p = weigh_keys(shared.q.index(s), shared.k.index(s), to_query, from_key, last, columns, tile, BT)
        shared.p.index(slot).store(p.to(shared.p.dtype))
        fence_async_shared()
        barriers.early.arrive(i)
        barriers.free.arrive(i)
        barriers.p_ready.arrive(i)


@gluon.jit
def _carry_gradient(results, shared, barriers, place, const, half: gl.constexpr):
    # Four warps: the gradient of the state of 64 columns of values.
    SAVE_STATES: gl.constexpr = const.SAVE_STATES
    BT: gl.constexpr = const.BT
    BV: gl.constexpr = 64
    K: gl.constexpr = const.K
    V: gl.constexpr = const.V
    first = place.column + half * BV
    state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])  # dS'^T [BV, K]
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])  # [BV, BT]
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    left_of_state: gl.constexpr = gl.DotOperandLayout(0, state, 2)
    by_column: gl.constexpr = gl.SliceLayout(0, tile)
    dtype: gl.constexpr = shared.k.dtype
    c_dtype: gl.constexpr = shared.c.dtype

    o_v = first + gl.arange(0, BV, gl.SliceLayout(1, state))
    o_k = gl.arange(0, K, gl.SliceLayout(0, state))
    b_ds = gl.zeros([BV, K], gl.float32, state)
    if const.HAS_FINAL:
        b_ds += gl.load(results.p_final + o_k[None, :] * V + o_v[:, None]).to(gl.float32)

    for i in range(place.chunks):
        s = i % const.STAGES
        slot = i % 2
        i_t = place.chunks - 1 - i
        b_dsh = b_ds.to(dtype)
        barriers.ready.wait(i)
        k_tile = shared.k.index(s)
        b_dn = warpgroup_mma(gl.convert_layout(b_dsh, left), k_tile.permute((1, 0)),
                             gl.zeros([BV, BT], gl.float32, tile), use_acc=False, is_async=True)  # fmt: skip
        barriers.p_ready.wait(i)
        b_do = shared.do.index(const.HALVES * s + half).permute((1, 0)).load(tile)
        # dS^T = gamma_C dS'^T + (scale gamma dO)^T Q^ - (gamma r beta dW)^T K
        b_ds = b_ds * gl.max(shared.prepared_vector(slot, GAMMA_C).load(by_column), 0)
        gamma = shared.prepared_vector(slot, TO_QUERY).load(by_column)
        b_doq = gl.convert_layout((b_do.to(gl.float32) * gamma[None, :]).to(dtype), left_of_state)
        b_ds = warpgroup_mma(b_doq, shared.q.index(s), b_ds, is_async=True)
        if SAVE_STATES:
            tma.store_wait(0)
            part_barrier()
            shared.dstates.index(half).store(b_dsh)
            fence_async_shared()
            part_barrier()
            state_row = place.state_row + i_t * (const.HV * V)
            tma_store(results.dstates, [state_row + first, 0], shared.dstates.index(half))
        # dN^T = (dS'^T K^T) rho r + dO^T P
        b_dn = warpgroup_mma_wait(1, [b_dn])
        b_dn = b_dn * shared.prepared_vector(slot, RHO_R).load(by_column)[None, :]
        b_dn = warpgroup_mma(gl.convert_layout(b_do, left), shared.p.index(slot), b_dn, is_async=True)
        b_dn, b_ds = warpgroup_mma_wait(0, [b_dn, b_ds])
        barriers.early.arrive(i)
        # dW^T = dN^T - (beta dN)^T C
        beta_s, inverse_s = shared.prepared_vector(slot, BETA), shared.prepared_vector(slot, INVERSE_BETA)
        b_z, b_used, down = step_and_back_prepared(b_dn, beta_s, inverse_s, c_dtype)
        b_dw = warpgroup_mma(gl.convert_layout(-b_z, left), shared.c.index(s), b_used, is_async=True)
        b_dw = warpgroup_mma_wait(0, [b_dw])
        b_dw = b_dw * down[:, None]
        b_du = b_dw * shared.prepared_vector(slot, MINUS_GAMMA_R_BETA).load(by_column)[None, :]
        b_high = b_du.to(dtype)
        b_ds = warpgroup_mma(gl.convert_layout(b_high, left_of_state), k_tile, b_ds, is_async=True)
        if const.SPLIT:
            b_low = (b_du - b_high.to(gl.float32)).to(dtype)
            b_ds = warpgroup_mma(gl.convert_layout(b_low, left_of_state), k_tile, b_ds, is_async=True)
        if SAVE_STATES:
            if c_dtype == gl.bfloat16:
                b_dw += b_dn - b_used  # as in `chunk_scan_backward`
            b_dw = b_dw * shared.prepared_vector(slot, KEPT).load(by_column)[None, :]
            shared.dv.index(half).permute((1, 0)).store(b_dw.to(dtype))
            fence_async_shared()
            part_barrier()
            tma_store(results.dv, [place.row + i_t * BT, place.head_column + first], shared.dv.index(half))
        b_ds = warpgroup_mma_wait(0, [b_ds])
        barriers.p_free.arrive(i)
        barriers.free.arrive(i)
    tma.store_wait(0)
    if const.SAVE_INITIAL:
        gl.store(results.p_initial + o_k[None, :] * V + o_v[:, None], b_ds)


@gluon.jit
def _allocate(q, k, c, do, dv, dstates, vector_rows, const):
    STAGES: gl.constexpr = const.STAGES
    HALVES: gl.constexpr = const.HALVES
    BT: gl.constexpr = const.BT
    q_s = gl.allocate_shared_memory(q.dtype, [STAGES, BT, const.K], k.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, BT, const.K], k.layout)
    c_s = gl.allocate_shared_memory(c.dtype, [STAGES, BT, BT], c.layout)
    do_s = gl.allocate_shared_memory(do.dtype, [STAGES * HALVES, BT, 64], k.layout)
    vec_s = gl.allocate_shared_memory(gl.float32, [STAGES * LOADED, 1, BT], vector_rows.layout)
    p_s = gl.allocate_shared_memory(q.dtype, [2, BT, BT], c.layout)
    prepared_s = gl.allocate_shared_memory(gl.float32, [2 * PREPARED, BT], FLAT)
    dv_s, dstates_s = None, None
    if const.SAVE_STATES:
        dv_s = gl.allocate_shared_memory(dv.dtype, [HALVES, BT, 64], dv.layout)
        dstates_s = gl.allocate_shared_memory(dstates.dtype, [HALVES, 64, const.K], dstates.layout)
    return Shared(q_s, k_s, c_s, do_s, vec_s, p_s, prepared_s, dv_s, dstates_s)


@gluon.jit(do_not_specialize=["T", "R", "scale"])
def chunk_scan_backward_hopper_kernel(
    q, k, c, do, dv, dstates, vectors, vector_rows, dfinal, dinitial, reach, T, R, scale,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BT: gl.constexpr, FACTORS: gl.constexpr,
    SAVE_STATES: gl.constexpr, HAS_FINAL: gl.constexpr, SAVE_INITIAL: gl.constexpr, REACH: gl.constexpr,
    SPLIT: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr, STATE_REGISTERS: gl.constexpr,
    PREPARE_REGISTERS: gl.constexpr,
):  # fmt: skip
    BV: gl.constexpr = 64 * HALVES
    const = Constants(HV, K, V, BT, FACTORS, HALVES, STAGES, SAVE_STATES, HAS_FINAL, SAVE_INITIAL, SPLIT)
    pid = gl.program_id(0)
    i_v = pid % (V // BV)
    i_h = (pid // (V // BV)) % HV
    i_n = pid // (V // BV * HV)
    row0 = i_n * T
    chunks = T // BT
    first_chunk = i_n * chunks
    if REACH:  # as in `chunk_scan_backward`
        chunks = gl.load(reach + 3 * (i_n * HV + i_h) + 2)
    p_state = (i_n * HV + i_h).to(gl.int64) * K * V
    p_final, p_initial = None, None
    if HAS_FINAL:
        p_final = dfinal + p_state
    if SAVE_INITIAL:
        p_initial = dinitial + p_state

    results = Results(dv, dstates, p_final, p_initial)
    shared = _allocate(q, k, c, do, dv, dstates, vector_rows, const)
    barriers = make_scan_barriers(STAGES, HALVES)
    place = Place(row0, first_chunk * BT, i_h // (HV // H) * K, i_h * V + i_v * BV, i_h * BT, 4 * i_h,
                  (first_chunk * HV + i_h) * V, i_v * BV, i_h * V, chunks)  # fmt: skip
    log_scale = gl.log2(scale)
    if HALVES == 2:
        gl.warp_specialize(
            [
                (_carry_gradient, (results, shared, barriers, place, const, 0)),
                (_carry_gradient, (results, shared, barriers, place, const, 1)),
                (_prepare, (shared, barriers, log_scale, chunks, const)),
                (_load_tiles, (q, k, c, do, vector_rows, shared, barriers, place, const)),
            ],
            [4, 4, 1],
            [STATE_REGISTERS, PREPARE_REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_carry_gradient, (results, shared, barriers, place, const, 0)),
                (_prepare, (shared, barriers, log_scale, chunks, const)),
                (_load_tiles, (q, k, c, do, vector_rows, shared, barriers, place, const)),
            ],
            [4, 1],
            [PREPARE_REGISTERS, 24],
        )


def launch_scan_backward(
    call: Call,
    operands: Operands,
    do: Tensor,
    dfinal: Tensor | None,
    dinitial: Tensor | None,
    dv: Tensor | None = None,
    dstates: Tensor | None = None,
    reach: Tensor | None = None,
) -> None:
    """Launch the kernel, as `Backend.backward_scan` says."""
    heads = call.HV * call.chunks.sequences
    settings = hopper_backward_settings(fills_gpu(heads), dstates is not None)
    launch(
        chunk_scan_backward_hopper_kernel,
        (call.V // (64 * settings.HALVES) * heads, 1, 1),
        token_tiles(call, operands.queries, call.K),
        operands.k,
        operands.c,
        token_tiles(call, do, call.columns),
        None if dv is None else Tiles(dv, CHUNK, call.columns),
        None if dstates is None else Tiles(dstates, call.columns, call.K),
        operands.vectors,
        operands.vector_rows,
        dfinal,
        dinitial,
        reach,
        call.chunks.seq_len,
        call.R,
        call.scale,
        SAVE_STATES=dstates is not None,
        HAS_FINAL=dfinal is not None,
        SAVE_INITIAL=dinitial is not None,
        REACH=reach is not None,
        SPLIT=call.split,
        V=call.V,
        FACTORS=call.factors,
        num_warps=4,
        **settings._asdict(),
        **call.sizes,
    )
