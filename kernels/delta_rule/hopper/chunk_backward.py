"""`chunk_backward` for Hopper, in Gluon: the same results from one program for both parts of a chunk and head.

A program stays on its multiprocessor and takes one chunk and head after the other. One warp loads tiles by the TMA into
a ring, in the order in which they are needed, so that the next chunk arrives while this one is computed: what is read,
and once, is what bounds this kernel. Four warps compute the query part, four the key part. In the notation of
`chunk_backward`, with X' for what is rounded to 16 bits with norms and gates, rows i, columns j:

    dP' = rq scale G . (dO Y^T) beta r  (i >= j)          dM' = -r G . (dX Y^T) beta r  (i > j)
    query part   rq dq^ = scale gamma rq (dO S^T) + dP' K                               <S, dS'>
    key part     r dk^ = -gamma r (dX S^T) + dM' K + N' dS'^T + dM'^T K + dP'^T Q         dbeta
                 N' = rho r beta Y

dP' goes to the key part through shared memory, where it and dM' are read as they are and transposed. dq takes the place
of Q in the ring and dk that of K, from where they are stored. Equations, roundings and what is given are
those of `chunk_backward`, which stays the readable form and does everything that this one is not made for.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lrnn.kernels.delta_rule.hopper.parts import as_vector, is_kept_small, part_barrier, tma_load, tma_store
from lrnn.kernels.delta_rule.portable.chunk_backward import FLOORED

# Tiles of a chunk and head, 16 KB each, in the order in which they are loaded. States come as halves of the values.
TILES = gl.constexpr(9)
DO, Y, DX, S, K_TILE, DS, Q_TILE = (gl.constexpr(n) for n in (0, 1, 2, 3, 5, 6, 8))


class ChunkBackwardLaunch(NamedTuple):
    """Tiles in shared memory, and registers of a thread of the key part. The query part gets what is left."""

    RING: int
    KEY_REGISTERS: int


def hopper_chunk_settings() -> ChunkBackwardLaunch:
    """Settings of `chunk_backward_hopper_kernel`. With 13 places a tile is followed by the one that stands four later
    in the next chunk: its loads wait for the first five tiles alone, not for K and Q, which are kept to the end."""
    return ChunkBackwardLaunch(RING=13, KEY_REGISTERS=240)


@gluon.jit
def _when_loaded(loaded, i, number: gl.constexpr, RING: gl.constexpr):
    # the tile of this number of the i-th chunk, once it is there
    ring, ready, free = loaded  # noqa: RUF059
    n = TILES * i + number
    mbarrier.wait(ready.index(n % RING), (n // RING) & 1)
    return ring.index(n % RING)


@gluon.jit
def _release(loaded, i, number: gl.constexpr, RING: gl.constexpr, parts: gl.constexpr = 1):
    # the place of a tile, on behalf of as many parts: of both where only one has read it
    ring, ready, free = loaded  # noqa: RUF059
    mbarrier.arrive(free.index((TILES * i + number) % RING), count=parts)


@gluon.jit
def _release_stored(loaded, i, number: gl.constexpr, RING: gl.constexpr):
    # the place of the chunk before, from which a result was stored: late, so that nobody waits for the TMA to read it
    ring, ready, free = loaded  # noqa: RUF059
    tma.store_wait(0)
    place = (TILES * i + number + RING - TILES) % RING
    mbarrier.arrive(free.index(place), count=2, pred=i > 0)


@gluon.jit
def _factor(vector, BT: gl.constexpr, NORMALIZE: gl.constexpr, layout: gl.constexpr):
    # 1/|x| of each token
    if NORMALIZE:
        return gl.exp2(as_vector(vector, BT).load(layout))
    else:
        return gl.full([BT], 1.0, gl.float32, layout)


@gluon.jit
def _load_tiles(
    q, k, do, dx, y, states, dstates, vector_rows, loaded, vectors, work, H: gl.constexpr, HV: gl.constexpr,
    K: gl.constexpr, V: gl.constexpr, BT: gl.constexpr, NORMALIZE: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    # one warp: the tiles of every chunk, and its two or four vectors
    ring, ready, free = loaded
    vec_s, vec_ready, vec_free = vectors
    first, step, chunks = work
    ROWS: gl.constexpr = 4 if NORMALIZE else 2
    for i in range(chunks):
        i_h = (first + i * step) % HV
        i_c = (first + i * step) // HV
        slot = i % 2
        mbarrier.wait(vec_free.index(slot), ((i // 2) & 1) ^ 1)
        mbarrier.expect(vec_ready.index(slot), ROWS * vector_rows.block_type.nbytes)
        for j in gl.static_range(ROWS):
            tma_load(vector_rows, [4 * i_h + j, i_c * BT], vec_ready.index(slot), vec_s.index(4 * slot + j))
        for number in gl.static_range(TILES):
            n = TILES * i + number
            tile, bar = ring.index(n % RING), ready.index(n % RING)
            mbarrier.wait(free.index(n % RING), ((n // RING) & 1) ^ 1)
            mbarrier.expect(bar, k.block_type.nbytes)
            state_row = (i_c * HV + i_h) * V
            if number == DO:
                tma_load(do, [i_c * BT, i_h * V], bar, tile)
            elif number == Y:
                tma_load(y, [i_c * BT, i_h * V], bar, tile)
            elif number == DX:
                tma_load(dx, [i_c * BT, i_h * V], bar, tile)
            elif number == K_TILE:
                tma_load(k, [i_c * BT, i_h // (HV // H) * K], bar, tile)
            elif number == Q_TILE:
                tma_load(q, [i_c * BT, i_h // (HV // H) * K], bar, tile)
            elif number < K_TILE:
                tma_load(states, [state_row + (number - S) * 64, 0], bar, tile)
            else:
                tma_load(dstates, [state_row + (number - DS) * 64, 0], bar, tile)


@gluon.jit
def _query_part(
    to_dq, p_dot_q, loaded, vectors, shared, work, R, scale, HV: gl.constexpr, K: gl.constexpr, BT: gl.constexpr,
    NORMALIZE: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    # four warps: dP', dq and <S, dS'>
    vec_s, vec_ready, vec_free = vectors
    dp_s, dm_s, dp_ready, q_done, k_done = shared  # noqa: RUF059
    first, step, chunks = work
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])  # [BT, BT]
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])  # [BT, K]
    by_row: gl.constexpr = gl.SliceLayout(1, tile)
    by_column: gl.constexpr = gl.SliceLayout(0, tile)
    by_row_wide: gl.constexpr = gl.SliceLayout(1, wide)
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, BT, by_row)
    columns = gl.arange(0, BT, by_column)
    t = gl.arange(0, BT, by_row_wide)
    dtype: gl.constexpr = dp_s.dtype
    for i in range(chunks):
        i_h = (first + i * step) % HV
        i_c = (first + i * step) // HV
        do = _when_loaded(loaded, i, DO, RING)
        y = _when_loaded(loaded, i, Y, RING)
        b_dp = warpgroup_mma(do, y.permute((1, 0)), gl.zeros([BT, BT], gl.float32, tile), use_acc=False,
                             is_async=True)  # fmt: skip
        s_low = _when_loaded(loaded, i, S, RING)
        b_dq = warpgroup_mma(do.slice(0, 64, 1), s_low, gl.zeros([BT, K], gl.float32, wide), use_acc=False,
                             is_async=True)  # fmt: skip
        s_high = _when_loaded(loaded, i, S + 1, RING)
        b_dq = warpgroup_mma(do.slice(64, 64, 1), s_high, b_dq, is_async=True)
        _release_stored(loaded, i, Q_TILE, RING)

        slot = i % 2
        mbarrier.wait(vec_ready.index(slot), (i // 2) & 1)
        g_tile, beta_tile = as_vector(vec_s.index(4 * slot), BT), as_vector(vec_s.index(4 * slot + 1), BT)
        g_row = g_tile.load(by_row_wide)
        g_column = g_tile.load(by_column)
        beta_r = beta_tile.load(by_column) * _factor(vec_s.index(4 * slot + 2), BT, NORMALIZE, by_column)
        rq = _factor(vec_s.index(4 * slot + 3), BT, NORMALIZE, by_row_wide)
        mbarrier.arrive(vec_free.index(slot), count=1)
        gamma_last = gl.exp2(gl.sum(gl.where(columns == BT - 1, g_column, 0.0), 0))
        mask = rows[:, None] >= columns[None, :]
        decay = gl.convert_layout(g_row, by_row)[:, None] - g_column[None, :]
        decay = gl.exp2(gl.where(mask, decay, 0.0))
        b_dp = warpgroup_mma_wait(2, [b_dp])
        b_dp = b_dp * decay * beta_r[None, :] * gl.convert_layout(rq * scale, by_row)[:, None]
        dp_s.store(gl.where(mask, b_dp, 0.0).to(dtype))
        fence_async_shared()
        part_barrier()
        b_dq = warpgroup_mma_wait(0, [b_dq])
        mbarrier.arrive(dp_ready, count=1)
        _release(loaded, i, DO, RING, 2)
        _release(loaded, i, Y, RING)
        # rq dq^ = scale gamma rq (dO S^T) + dP' K
        b_dq = b_dq * (gl.exp2(g_row) * rq * scale)[:, None]
        b_dq = warpgroup_mma(dp_s, _when_loaded(loaded, i, K_TILE, RING), b_dq, is_async=True)
        b_ss = gl.zeros([64], gl.float32, gl.SliceLayout(1, plain))
        ds = _when_loaded(loaded, i, DS, RING)
        b_ss += gl.sum(s_low.load(plain).to(gl.float32) * ds.load(plain).to(gl.float32), 1)
        ds = _when_loaded(loaded, i, DS + 1, RING)
        b_ss += gl.sum(s_high.load(plain).to(gl.float32) * ds.load(plain).to(gl.float32), 1)
        ss = gl.sum(b_ss, 0)
        for half in gl.static_range(2):
            _release(loaded, i, S + half, RING)
            _release(loaded, i, DS + half, RING)
        q_tile = _when_loaded(loaded, i, Q_TILE, RING)
        b_q = q_tile.load(wide).to(gl.float32)
        b_dq = warpgroup_mma_wait(0, [b_dq])
        mbarrier.arrive(k_done, count=1)
        dot = gl.sum(b_q * b_dq, 1)
        head = i_h.to(gl.int64) * R + i_c * BT
        gl.store(p_dot_q + head + t, dot + gl.where(t == BT - 1, ss * gamma_last, 0.0))
        if NORMALIZE:
            b_dq = b_dq - b_q * (rq * rq * gl.where(rq < FLOORED, dot, 0.0))[:, None]
        mbarrier.wait(q_done, i & 1)
        q_tile.store(b_dq.to(dtype))
        fence_async_shared()
        part_barrier()
        tma_store(to_dq, [i_c * BT, i_h * K], q_tile)
    tma.store_wait(0)


@gluon.jit
def _key_part(
    to_dk, dv, p_dbeta, p_dot_k, loaded, vectors, shared, work, R, HV: gl.constexpr, K: gl.constexpr,
    V: gl.constexpr, BT: gl.constexpr, NORMALIZE: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    # four warps: dM', dk and dbeta, and dv where the scan left dW in its place
    vec_s, vec_ready, vec_free = vectors
    dp_s, dm_s, dp_ready, q_done, k_done = shared
    first, step, chunks = work
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])  # [BT, BT], and halves of values
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])  # [BT, K]
    left: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, tile)
    by_column: gl.constexpr = gl.SliceLayout(0, tile)
    by_row_wide: gl.constexpr = gl.SliceLayout(1, wide)
    rows = gl.arange(0, BT, by_row)
    columns = gl.arange(0, BT, by_column)
    t = gl.arange(0, BT, by_row_wide)
    dtype: gl.constexpr = dm_s.dtype
    for i in range(chunks):
        i_h = (first + i * step) % HV
        i_c = (first + i * step) // HV
        head = i_h.to(gl.int64) * R + i_c * BT
        y = _when_loaded(loaded, i, Y, RING)
        dx = _when_loaded(loaded, i, DX, RING)
        b_dm = warpgroup_mma(dx, y.permute((1, 0)), gl.zeros([BT, BT], gl.float32, tile), use_acc=False,
                             is_async=True)  # fmt: skip
        s = _when_loaded(loaded, i, S, RING)
        b_dk = warpgroup_mma(dx.slice(0, 64, 1), s, gl.zeros([BT, K], gl.float32, wide), use_acc=False,
                             is_async=True)  # fmt: skip
        s = _when_loaded(loaded, i, S + 1, RING)
        b_dk = warpgroup_mma(dx.slice(64, 64, 1), s, b_dk, is_async=True)
        _release_stored(loaded, i, K_TILE, RING)
        slot = i % 2
        mbarrier.wait(vec_ready.index(slot), (i // 2) & 1)
        g_tile, beta_tile = as_vector(vec_s.index(4 * slot), BT), as_vector(vec_s.index(4 * slot + 1), BT)
        g, beta = g_tile.load(by_row), beta_tile.load(by_row)
        rk = _factor(vec_s.index(4 * slot + 2), BT, NORMALIZE, by_row)
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
        beta_r_column = beta_tile.load(by_column) * _factor(vec_s.index(4 * slot + 2), BT, NORMALIZE, by_column)
        mbarrier.arrive(vec_free.index(slot), count=1)
        g_last = gl.sum(gl.where(columns == BT - 1, g_column, 0.0), 0)
        mask = rows[:, None] > columns[None, :]
        decay = gl.exp2(gl.where(mask, g[:, None] - g_column[None, :], 0.0))
        b_dm = warpgroup_mma_wait(2, [b_dm])
        b_dm = b_dm * decay * -dx_r[:, None] * beta_r_column[None, :]
        dm_s.store(gl.where(mask, b_dm, 0.0).to(dtype))
        fence_async_shared()
        part_barrier()
        b_dk = warpgroup_mma_wait(0, [b_dk])
        _release(loaded, i, DX, RING, 2)
        for half in gl.static_range(2):
            _release(loaded, i, S + half, RING)

        # -gamma r (dX S^T) + dM' K
        b_dk = b_dk * gl.convert_layout(-gl.exp2(g) * dx_r, by_row_wide)[:, None]
        k_tile = _when_loaded(loaded, i, K_TILE, RING)
        b_dk = warpgroup_mma(dm_s, k_tile, b_dk, is_async=True)
        to_n = (beta_r * gl.exp2(g_last - g))[:, None]
        n_low = gl.convert_layout((y.slice(0, 64, 1).load(tile).to(gl.float32) * to_n).to(dtype), left)
        n_high = gl.convert_layout((y.slice(64, 64, 1).load(tile).to(gl.float32) * to_n).to(dtype), left)
        _release(loaded, i, Y, RING)
        b_k = k_tile.load(wide)
        b_dk = warpgroup_mma_wait(0, [b_dk])
        dot_left = gl.sum(b_dk * b_k.to(gl.float32), 1)

        # + N' dS'^T
        b_dk = warpgroup_mma(n_low, _when_loaded(loaded, i, DS, RING), b_dk, is_async=True)
        b_dk = warpgroup_mma(n_high, _when_loaded(loaded, i, DS + 1, RING), b_dk, is_async=True)
        b_dk = warpgroup_mma_wait(0, [b_dk])
        for half in gl.static_range(2):
            _release(loaded, i, DS + half, RING)
        at_end = gl.sum(gl.sum(b_dk * b_k.to(gl.float32), 1) - dot_left, 0)

        # + dM'^T K + dP'^T Q
        b_dk = warpgroup_mma(dm_s.permute((1, 0)), k_tile, b_dk, is_async=True)
        q_tile = _when_loaded(loaded, i, Q_TILE, RING)
        mbarrier.wait(dp_ready, i & 1)
        b_dk = warpgroup_mma(dp_s.permute((1, 0)), q_tile, b_dk, is_async=True)
        b_dk = warpgroup_mma_wait(0, [b_dk])
        mbarrier.wait(k_done, i & 1)  # first: then the query part cannot be two chunks ahead of a wait
        mbarrier.arrive(q_done, count=1)
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
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BT: gl.constexpr, NORMALIZE: gl.constexpr,
    RING: gl.constexpr, KEY_REGISTERS: gl.constexpr,
):  # fmt: skip
    # The heads of a chunk are taken side by side: those that share K and Q find them in the second-level cache.
    first = gl.program_id(0)
    step = gl.num_programs(0)
    own_chunks = (chunks * HV - first + step - 1) // step

    ring = gl.allocate_shared_memory(k.dtype, [RING, BT, K], k.layout)
    dp_s = gl.allocate_shared_memory(k.dtype, [BT, BT], k.layout)
    dm_s = gl.allocate_shared_memory(k.dtype, [BT, BT], k.layout)
    vec_s = gl.allocate_shared_memory(gl.float32, [8, 1, BT], vector_rows.layout)
    ready = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    vec_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    vec_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    between = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(RING):
        mbarrier.init(ready.index(n), count=1)
        mbarrier.init(free.index(n), count=2)
    for n in gl.static_range(2):
        mbarrier.init(vec_ready.index(n), count=1)
        mbarrier.init(vec_free.index(n), count=2)
    for n in gl.static_range(3):
        mbarrier.init(between.index(n), count=1)
    fence_async_shared()
    part_barrier()

    loaded = (ring, ready, free)
    vectors = (vec_s, vec_ready, vec_free)
    # Of the parts: dP' is there; the key part has read Q, and dP'; the query part has read K.
    shared = (dp_s, dm_s, between.index(0), between.index(1), between.index(2))
    work = (first, step, own_chunks)
    # Tuples that are assigned turn constants into tensors, so these are written where they are used.
    gl.warp_specialize(
        [
            (_query_part, (dq, dot_q, loaded, vectors, shared, work, R, scale, HV, K, BT, NORMALIZE, RING)),
            (_key_part, (dk, dv, dbeta, dot_k, loaded, vectors, shared, work, R, HV, K, V, BT, NORMALIZE, RING)),
            (_load_tiles, (q, k, do, dx, y, states, dstates, vector_rows, loaded, vectors, work, H, HV, K, V, BT,
                           NORMALIZE, RING)),
        ],
        [4, 1],
        [KEY_REGISTERS, 24],
    )  # fmt: skip
