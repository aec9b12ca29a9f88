"""`chunk_backward` for Hopper, in Gluon: the same results from one program for both parts of a chunk and head.

A program stays on its multiprocessor and takes one chunk and head after the other. One warp loads tiles with the TMA
into a ring, in the order in which they are needed, so that the next chunk arrives while this one is computed. This
kernel is bound by what it reads, and it reads everything once. Four warps compute the query part, four the key part. In
the notation of `chunk_backward`, with X' for X rounded to 16 bits with norms and gates, rows i, columns j:

    dP' = rq scale G . (dO Y^T) beta r  (i >= j)          dM' = -r G . (dX Y^T) beta r  (i > j)
    query part   rq dq^ = scale gamma rq (dO S^T) + dP' K                               <S, dS'>
    key part     r dk^ = -gamma r (dX S^T) + dM' K + N' dS'^T + dM'^T K + dP'^T Q         dbeta
                 N' = rho r beta Y

dP' goes to the key part through shared memory, where dP' and dM' are read both as they are and transposed. dq takes the
place of Q in the ring, and dk that of K; they are stored from there. Equations, roundings and arguments are those of
`chunk_backward`. That kernel remains the readable form, and runs all calls that this one is not made for.
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
from lrnn.kernels.common.launch import launch, multiprocessors
from lrnn.kernels.common.tiles import Tiles
from lrnn.kernels.delta_rule.call import Call, Operands
from lrnn.kernels.delta_rule.hopper.parts import (
    Buffer,
    Phases,
    aggregate,
    allocate_barriers,
    as_vector,
    is_kept_small,
    last_steps,
    load_by_token,
    part_barrier,
    store_by_token,
    tma_load,
    tma_store,
    token_tiles,
)
from lrnn.kernels.delta_rule.portable.chunk_backward import FLOORED

# Tiles of a chunk and head, 16 KB each, in the order in which they are loaded. States come as halves of the values.
TILES = gl.constexpr(9)
DO, Y, DX, S, K_TILE, DS, Q_TILE = (gl.constexpr(n) for n in (0, 1, 2, 3, 5, 6, 8))
# Vectors of a chunk and head. The last two, log2 of 1/|k| and 1/|q|, are loaded only where these are normalised.
VECTORS = gl.constexpr(4)
GATES, STEPS, LOG_RK, LOG_RQ = (gl.constexpr(n) for n in range(4))


class ChunkBackwardLaunch(NamedTuple):
    """Tiles in shared memory, and registers of a thread of the key part. The query part gets the others."""

    RING: int
    KEY_REGISTERS: int


def hopper_chunk_settings() -> ChunkBackwardLaunch:
    """Settings of `chunk_backward_hopper_kernel`. With 13 places, a tile is followed by the one four later in the
    next chunk. Its loads then wait only for the first five tiles, not for K and Q, which are kept to the end."""
    return ChunkBackwardLaunch(RING=13, KEY_REGISTERS=240)


@aggregate
class Constants:
    """What the kernel is compiled for."""

    H: gl.constexpr
    HV: gl.constexpr
    K: gl.constexpr
    V: gl.constexpr
    BT: gl.constexpr
    FACTORS: gl.constexpr
    NORMALIZE: gl.constexpr


@aggregate
class Ring:
    """Places for tiles in shared memory, which are used in turn: by the tiles of the program's first chunk and head in
    their order, then by those of the next."""

    tiles: Buffer  # [RING, BT, K]
    ready: Phases  # a tile is loaded
    free: Phases  # both parts are done with it
    RING: gl.constexpr

    @gluon.jit
    def when_loaded(self, i, number: gl.constexpr):
        # the tile of this number of the i-th chunk, once it is there
        n = TILES * i + number
        self.ready.wait(n)
        return self.tiles.index(n % self.RING)

    @gluon.jit
    def release(self, i, number: gl.constexpr, parts: gl.constexpr = 1):
        # the place of a tile, on behalf of as many parts: of both where only one has read it
        self.free.arrive(TILES * i + number, count=parts)

    @gluon.jit
    def release_stored(self, i, number: gl.constexpr):
        # the place of the chunk before, from which a result was stored: late, so that nobody waits for the TMA to read
        tma.store_wait(0)
        place = (TILES * i + number + self.RING - TILES) % self.RING
        mbarrier.arrive(self.free.barriers.index(place), count=2, pred=i > 0)


@aggregate
class Vectors:
    """The vectors of two chunks, one in use and one that arrives."""

    rows: Buffer  # [2 * VECTORS, 1, BT]
    ready: Phases  # loaded
    free: Phases  # both parts are done with them

    @gluon.jit
    def vector(self, i, number: gl.constexpr, const):
        return as_vector(self.rows.index(VECTORS * (i % 2) + number), const.BT)

    @gluon.jit
    def factor(self, i, number: gl.constexpr, const, layout: gl.constexpr):
        # 1/|x| of each token
        if const.NORMALIZE:
            return gl.exp2(self.vector(i, number, const).load(layout))
        else:
            return gl.full([const.BT], 1.0, gl.float32, layout)


@aggregate
class Between:
    """What the query part and the key part have in common, and tell each other once per chunk."""

    dp: Buffer  # [BT, BT]
    dm: Buffer  # [BT, BT]
    dp_ready: Buffer  # barrier: dP' is there
    q_done: Buffer  # barrier: the key part has read Q, and dP'
    k_done: Buffer  # barrier: the query part has read K


@aggregate
class Work:
    """The chunks and heads that a program takes: every `step`-th, from `first` on."""

    first: gl.tensor
    step: gl.tensor
    chunks: gl.tensor

    @gluon.jit
    def at(self, i, HV: gl.constexpr):
        # the i-th: (head, chunk)
        number = self.first + i * self.step
        return number % HV, number // HV


@gluon.jit
def _load_tiles(q, k, do, dx, y, states, dstates, vector_rows, ring, vectors, work, const):
    # One warp: the tiles of every chunk, and its two or four vectors.
    H: gl.constexpr = const.H
    HV: gl.constexpr = const.HV
    K: gl.constexpr = const.K
    V: gl.constexpr = const.V
    BT: gl.constexpr = const.BT
    ROWS: gl.constexpr = VECTORS if const.NORMALIZE else LOG_RK
    for i in range(work.chunks):
        i_h, i_c = work.at(i, HV)
        vectors.free.wait_for_previous(i)
        mbarrier.expect(vectors.ready.of(i), ROWS * vector_rows.block_type.nbytes)
        for j in gl.static_range(ROWS):
            tma_load(vector_rows, [i_h * VECTORS + j, i_c * BT], vectors.ready.of(i),
                     vectors.rows.index(VECTORS * (i % 2) + j))  # fmt: skip
        for number in gl.static_range(TILES):
            n = TILES * i + number
            tile, bar = ring.tiles.index(n % ring.RING), ring.ready.of(n)
            ring.free.wait_for_previous(n)
            mbarrier.expect(bar, k.block_type.nbytes)
            state_row = (i_c * HV + i_h) * V
            if number == DO:
                load_by_token(do, i_c * BT, i_h * V, bar, tile, const.FACTORS)
            elif number == Y:
                tma_load(y, [i_c * BT, i_h * V], bar, tile)
            elif number == DX:
                tma_load(dx, [i_c * BT, i_h * V], bar, tile)
            elif number == K_TILE:
                tma_load(k, [i_c * BT, i_h // (HV // H) * K], bar, tile)
            elif number == Q_TILE:
                load_by_token(q, i_c * BT, i_h // (HV // H) * K, bar, tile, const.FACTORS)
            elif number < K_TILE:
                tma_load(states, [state_row + (number - S) * 64, 0], bar, tile)
            else:
                tma_load(dstates, [state_row + (number - DS) * 64, 0], bar, tile)


@gluon.jit
def _query_part(to_dq, p_dot_q, ring, vectors, between, work, R, scale, const):
    # Four warps: dP', dq and <S, dS'>.
    K: gl.constexpr = const.K
    BT: gl.constexpr = const.BT
    FACTORS: gl.constexpr = const.FACTORS
    NORMALIZE: gl.constexpr = const.NORMALIZE
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])  # [BT, BT]
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])  # [BT, K]
    by_row: gl.constexpr = gl.SliceLayout(1, tile)
    by_column: gl.constexpr = gl.SliceLayout(0, tile)
    by_row_wide: gl.constexpr = gl.SliceLayout(1, wide)
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, BT, by_row)
    columns = gl.arange(0, BT, by_column)
    t = gl.arange(0, BT, by_row_wide)
    dtype: gl.constexpr = between.dp.dtype
    for i in range(work.chunks):
        i_h, i_c = work.at(i, const.HV)
        do = ring.when_loaded(i, DO)
        y = ring.when_loaded(i, Y)
        b_dp = warpgroup_mma(do, y.permute((1, 0)), gl.zeros([BT, BT], gl.float32, tile), use_acc=False,
                             is_async=True)  # fmt: skip
        s_low = ring.when_loaded(i, S)
        b_dq = warpgroup_mma(do.slice(0, 64, 1), s_low, gl.zeros([BT, K], gl.float32, wide), use_acc=False,
                             is_async=True)  # fmt: skip
        s_high = ring.when_loaded(i, S + 1)
        b_dq = warpgroup_mma(do.slice(64, 64, 1), s_high, b_dq, is_async=True)
        ring.release_stored(i, Q_TILE)

        vectors.ready.wait(i)
        g_tile, beta_tile = vectors.vector(i, GATES, const), vectors.vector(i, STEPS, const)
        g_row = g_tile.load(by_row_wide)
        g_column = g_tile.load(by_column)
        beta_r = beta_tile.load(by_column) * vectors.factor(i, LOG_RK, const, by_column)
        rq = vectors.factor(i, LOG_RQ, const, by_row_wide)
        vectors.free.arrive(i)
        gamma_last = gl.exp2(gl.sum(gl.where(columns == BT - 1, g_column, 0.0), 0))
        mask = last_steps(rows, FACTORS)[:, None] >= columns[None, :]
        decay = gl.convert_layout(g_row, by_row)[:, None] - g_column[None, :]
        decay = gl.exp2(gl.where(mask, decay, 0.0))
        b_dp = warpgroup_mma_wait(2, [b_dp])
        b_dp = b_dp * decay * beta_r[None, :] * gl.convert_layout(rq * scale, by_row)[:, None]
        between.dp.store(gl.where(mask, b_dp, 0.0).to(dtype))
        fence_async_shared()
        part_barrier()
        b_dq = warpgroup_mma_wait(0, [b_dq])
        mbarrier.arrive(between.dp_ready, count=1)
        ring.release(i, DO, 2)
        ring.release(i, Y)
        # rq dq^ = scale gamma rq (dO S^T) + dP' K
        b_dq = b_dq * (gl.exp2(g_row) * rq * scale)[:, None]
        b_dq = warpgroup_mma(between.dp, ring.when_loaded(i, K_TILE), b_dq, is_async=True)
        b_ss = gl.zeros([64], gl.float32, gl.SliceLayout(1, plain))
        ds = ring.when_loaded(i, DS)
        b_ss += gl.sum(s_low.load(plain).to(gl.float32) * ds.load(plain).to(gl.float32), 1)
        ds = ring.when_loaded(i, DS + 1)
        b_ss += gl.sum(s_high.load(plain).to(gl.float32) * ds.load(plain).to(gl.float32), 1)
        ss = gl.sum(b_ss, 0)
        for half in gl.static_range(2):
            ring.release(i, S + half)
            ring.release(i, DS + half)
        q_tile = ring.when_loaded(i, Q_TILE)
        b_q = q_tile.load(wide).to(gl.float32)
        b_dq = warpgroup_mma_wait(0, [b_dq])
        mbarrier.arrive(between.k_done, count=1)
        dot = gl.sum(b_q * b_dq, 1)
        head = i_h.to(gl.int64) * R + i_c * BT
        if FACTORS == 1:
            gl.store(p_dot_q + head + t, dot + gl.where(t == BT - 1, ss * gamma_last, 0.0))
        else:  # at the tokens' last steps
            dot_q = dot + gl.where(t == BT - FACTORS, ss * gamma_last, 0.0)
            gl.store(p_dot_q + head + last_steps(t, FACTORS), dot_q, mask=t % FACTORS == 0)
        if NORMALIZE:
            b_dq = b_dq - b_q * (rq * rq * gl.where(rq < FLOORED, dot, 0.0))[:, None]
        mbarrier.wait(between.q_done, i & 1)
        q_tile.store(b_dq.to(dtype))
        fence_async_shared()
        part_barrier()
        store_by_token(to_dq, i_c * BT, i_h * K, q_tile, const.FACTORS)
    tma.store_wait(0)


@gluon.jit
def _key_part(to_dk, dv, p_dbeta, p_dot_k, ring, vectors, between, work, R, const):
    # Four warps: dM', dk and dbeta, and dv where the scan left dW in its place.
    HV: gl.constexpr = const.HV
    K: gl.constexpr = const.K
    V: gl.constexpr = const.V
    BT: gl.constexpr = const.BT
    NORMALIZE: gl.constexpr = const.NORMALIZE
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])  # [BT, BT], and halves of values
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])  # [BT, K]
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, tile)
    by_column: gl.constexpr = gl.SliceLayout(0, tile)
    by_row_wide: gl.constexpr = gl.SliceLayout(1, wide)
    rows = gl.arange(0, BT, by_row)
    columns = gl.arange(0, BT, by_column)
    t = gl.arange(0, BT, by_row_wide)
    dtype: gl.constexpr = between.dm.dtype
    for i in range(work.chunks):
        i_h, i_c = work.at(i, const.HV)
        head = i_h.to(gl.int64) * R + i_c * BT
        y = ring.when_loaded(i, Y)
        dx = ring.when_loaded(i, DX)
        b_dm = warpgroup_mma(dx, y.permute((1, 0)), gl.zeros([BT, BT], gl.float32, tile), use_acc=False,
                             is_async=True)  # fmt: skip
        s = ring.when_loaded(i, S)
        b_dk = warpgroup_mma(dx.slice(0, 64, 1), s, gl.zeros([BT, K], gl.float32, wide), use_acc=False,
                             is_async=True)  # fmt: skip
        s = ring.when_loaded(i, S + 1)
        b_dk = warpgroup_mma(dx.slice(64, 64, 1), s, b_dk, is_async=True)
        ring.release_stored(i, K_TILE)
        vectors.ready.wait(i)
        g_tile, beta_tile = vectors.vector(i, GATES, const), vectors.vector(i, STEPS, const)
        g, beta = g_tile.load(by_row), beta_tile.load(by_row)
        rk = vectors.factor(i, LOG_RK, const, by_row)
        beta_r = beta * rk

        # dbeta, and dv of small step sizes
        is_small = is_kept_small(beta, dtype)
        b_dbeta = gl.sum(dx.slice(0, 64, 1).load(tile).to(gl.float32) * y.slice(0, 64, 1).load(tile).to(gl.float32), 1)
        b_dbeta += gl.sum(
            dx.slice(64, 64, 1).load(tile).to(gl.float32) * y.slice(64, 64, 1).load(tile).to(gl.float32), 1
        )
        gl.store(p_dbeta + head + rows, b_dbeta / gl.where(is_small, 1.0, beta))
        dx_r = gl.where(is_small, beta, 1.0) * rk
        if is_kept_small(gl.min(beta_tile.load(by_column), 0), dtype):
            p_dv = dv + (i_c * BT + rows).to(gl.int64)[:, None] * (HV * V) + i_h * V + columns[None, :]
            for half in gl.static_range(2):
                b_dv = dx.slice(64 * half, 64, 1).load(tile).to(gl.float32) * beta[:, None]
                gl.store(p_dv + 64 * half, b_dv.to(dtype), mask=is_small[:, None])

        # dM'
        g_column = g_tile.load(by_column)
        beta_r_column = beta_tile.load(by_column) * vectors.factor(i, LOG_RK, const, by_column)
        vectors.free.arrive(i)
        g_last = gl.sum(gl.where(columns == BT - 1, g_column, 0.0), 0)
        mask = rows[:, None] > columns[None, :]
        decay = gl.exp2(gl.where(mask, g[:, None] - g_column[None, :], 0.0))
        b_dm = warpgroup_mma_wait(2, [b_dm])
        b_dm = b_dm * decay * -dx_r[:, None] * beta_r_column[None, :]
        between.dm.store(gl.where(mask, b_dm, 0.0).to(dtype))
        fence_async_shared()
        part_barrier()
        b_dk = warpgroup_mma_wait(0, [b_dk])
        ring.release(i, DX, 2)
        for half in gl.static_range(2):
            ring.release(i, S + half)

        # -gamma r (dX S^T) + dM' K
        b_dk = b_dk * gl.convert_layout(-gl.exp2(g) * dx_r, by_row_wide)[:, None]
        k_tile = ring.when_loaded(i, K_TILE)
        b_dk = warpgroup_mma(between.dm, k_tile, b_dk, is_async=True)
        to_n = (beta_r * gl.exp2(g_last - g))[:, None]
        n_low = gl.convert_layout((y.slice(0, 64, 1).load(tile).to(gl.float32) * to_n).to(dtype), left)
        n_high = gl.convert_layout((y.slice(64, 64, 1).load(tile).to(gl.float32) * to_n).to(dtype), left)
        ring.release(i, Y)
        b_k = k_tile.load(wide)
        b_dk = warpgroup_mma_wait(0, [b_dk])
        dot_left = gl.sum(b_dk * b_k.to(gl.float32), 1)

        # + N' dS'^T
        b_dk = warpgroup_mma(n_low, ring.when_loaded(i, DS), b_dk, is_async=True)
        b_dk = warpgroup_mma(n_high, ring.when_loaded(i, DS + 1), b_dk, is_async=True)
        b_dk = warpgroup_mma_wait(0, [b_dk])
        for half in gl.static_range(2):
            ring.release(i, DS + half)
        at_end = gl.sum(gl.sum(b_dk * b_k.to(gl.float32), 1) - dot_left, 0)

        # + dM'^T K + dP'^T Q
        b_dk = warpgroup_mma(between.dm.permute((1, 0)), k_tile, b_dk, is_async=True)
        q_tile = ring.when_loaded(i, Q_TILE)
        mbarrier.wait(between.dp_ready, i & 1)
        b_dk = warpgroup_mma(between.dp.permute((1, 0)), q_tile, b_dk, is_async=True)
        b_dk = warpgroup_mma_wait(0, [b_dk])
        mbarrier.wait(between.k_done, i & 1)  # first: then the query part cannot be two chunks ahead of a wait
        mbarrier.arrive(between.q_done, count=1)
        b_k32 = b_k.to(gl.float32)
        dot = gl.sum(b_dk * b_k32, 1)
        gl.store(p_dot_k + head + t, 2.0 * dot_left - dot + gl.where(t == BT - 1, at_end, 0.0))
        if NORMALIZE:
            rk_wide = gl.convert_layout(rk, by_row_wide)
            b_dk = b_dk - b_k32 * (rk_wide * rk_wide * gl.where(rk_wide < FLOORED, dot, 0.0))[:, None]
        k_tile.store(b_dk.to(dtype))
        fence_async_shared()
        part_barrier()
        tma_store(to_dk, [i_c * BT, i_h * K], k_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["chunks", "R", "scale"])
def chunk_backward_hopper_kernel(
    q, k, do, dx, y, states, dstates, dq, dk, dv, dbeta, dot_q, dot_k, vector_rows, chunks, R, scale,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BT: gl.constexpr, FACTORS: gl.constexpr,
    NORMALIZE: gl.constexpr, RING: gl.constexpr, KEY_REGISTERS: gl.constexpr,
):  # fmt: skip
    # The heads of a chunk are taken side by side: those that share K and Q find them in the second-level cache.
    first = gl.program_id(0)
    step = gl.num_programs(0)
    work = Work(first, step, (chunks * HV - first + step - 1) // step)
    const = Constants(H, HV, K, V, BT, FACTORS, NORMALIZE)

    tiles = gl.allocate_shared_memory(k.dtype, [RING, BT, K], k.layout)
    dp = gl.allocate_shared_memory(k.dtype, [BT, BT], k.layout)
    dm = gl.allocate_shared_memory(k.dtype, [BT, BT], k.layout)
    rows = gl.allocate_shared_memory(gl.float32, [2 * VECTORS, 1, BT], vector_rows.layout)
    ready, free = allocate_barriers(RING), allocate_barriers(RING)
    vec_ready, vec_free = allocate_barriers(2), allocate_barriers(2)
    once = allocate_barriers(3)
    for n in gl.static_range(RING):
        mbarrier.init(ready.index(n), count=1)
        mbarrier.init(free.index(n), count=2)
    for n in gl.static_range(2):
        mbarrier.init(vec_ready.index(n), count=1)
        mbarrier.init(vec_free.index(n), count=2)
    for n in gl.static_range(3):
        mbarrier.init(once.index(n), count=1)
    fence_async_shared()
    part_barrier()

    ring = Ring(tiles, Phases(ready, RING), Phases(free, RING), RING)
    vectors = Vectors(rows, Phases(vec_ready, 2), Phases(vec_free, 2))
    between = Between(dp, dm, once.index(0), once.index(1), once.index(2))
    gl.warp_specialize(
        [
            (_query_part, (dq, dot_q, ring, vectors, between, work, R, scale, const)),
            (_key_part, (dk, dv, dbeta, dot_k, ring, vectors, between, work, R, const)),
            (_load_tiles, (q, k, do, dx, y, states, dstates, vector_rows, ring, vectors, work, const)),
        ],
        [4, 1],
        [KEY_REGISTERS, 24],
    )


def launch_chunk_backward(
    call: Call,
    operands: Operands,
    do: Tensor,
    dv: Tensor,
    y: Tensor,
    states: Tensor,
    dstates: Tensor,
    dq: Tensor,
    dk: Tensor,
    dbeta: Tensor,
    dot_q: Tensor,
    dot_k: Tensor,
) -> None:
    """Launch the kernel, as `Backend.chunk_backward` says."""
    launch(
        chunk_backward_hopper_kernel,
        (min(call.chunks.count * call.HV, multiprocessors(call.device)), 1, 1),
        token_tiles(call, operands.queries, call.K),
        operands.k,
        token_tiles(call, do, call.K),
        *(Tiles(x, CHUNK, call.K) for x in (dv, y, states, dstates)),
        token_tiles(call, dq, call.K),
        Tiles(dk, CHUNK, call.K),
        dv,
        dbeta,
        dot_q,
        dot_k,
        operands.vector_rows,
        call.chunks.count,
        call.R,
        call.scale,
        V=call.V,
        FACTORS=call.factors,
        NORMALIZE=call.normalize_qk,
        num_warps=4,
        **hopper_chunk_settings()._asdict(),
        **call.sizes,
    )
