"""What the kernels in Gluon share: its names in several versions of Triton, barriers, vectors in shared memory, P.

Gluon is experimental, and renames: `thread_barrier` became `barrier` in Triton 3.7, the copies of the TMA `async_load`
and `async_store` in 3.8, and `_reinterpret` `reinterpret` in 3.9. So each name is looked up by itself.
"""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from lrnn.kernels.common.constants import LEAST_KEPT, LEAST_KEPT_FP16, SMALL_BETA


def _named(owner: Any, *names: str) -> Any:
    # What has the first of these names. The new one comes first: Triton may keep the old one, to raise an error.
    return next(getattr(owner, name) for name in names if hasattr(owner, name))


part_barrier = _named(gl, "barrier", "thread_barrier")  # of the warps of one part
tma_load = _named(tma, "async_load", "async_copy_global_to_shared")
tma_store = _named(tma, "async_store", "async_copy_shared_to_global")
_HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))  # of a vector in shared memory


@gluon.jit
def make_barriers(STAGES: gl.constexpr, HALVES: gl.constexpr):
    # of the tiles of a chunk (`ready` for all; those of which nothing is needed by the chunk's end are free again at
    # `early`, the others at `free`, when each half and who prepares is done with them) and of what is prepared from
    # them, in two slots (`p_ready`, and `p_free` when each half is done)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    early = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    p_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(early.index(s), count=HALVES + 1)
        mbarrier.init(free.index(s), count=HALVES + 1)
    for s in gl.static_range(2):
        mbarrier.init(p_ready.index(s), count=1)
        mbarrier.init(p_free.index(s), count=HALVES)
    fence_async_shared()
    part_barrier()
    return ready, early, free, p_ready, p_free


@gluon.jit
def inverse_step(beta):
    # 1 / beta for `step_and_back_prepared`, 0 where beta is small
    return gl.where(beta < SMALL_BETA, 0.0, 1.0 / beta)


@gluon.jit
def is_kept_small(beta, dtype: gl.constexpr):
    # as `portable.parts.is_kept_small`
    if dtype == gl.float16:
        return beta < LEAST_KEPT_FP16
    else:
        return beta < LEAST_KEPT


@gluon.jit
def reinterpret(tile, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    if _HAS_REINTERPRET:
        return tile.reinterpret(dtype, shape, layout)
    else:
        return tile._reinterpret(dtype, shape, layout)


@gluon.jit
def as_vector(tile, BT: gl.constexpr):
    # a tile [1, BT] of float32, as the TMA puts it there, as a vector
    return reinterpret(tile, gl.float32, [BT], FLAT)


@gluon.jit
def weigh_keys(q_tile, k_tile, to_query, from_key, rows, columns, tile: gl.constexpr, BT: gl.constexpr):
    # P = scale tril(G . Q^ K^T r): all factors but Q K^T as exponents, by row `to_query`, by column `-from_key`. The
    # exponent is masked, since above the diagonal it would overflow.
    qk = warpgroup_mma(q_tile, k_tile.permute((1, 0)), gl.zeros([BT, BT], gl.float32, tile), use_acc=False)
    exponent = gl.where(rows[:, None] >= columns[None, :], to_query[:, None] - from_key[None, :], float("-inf"))
    return qk * gl.exp2(exponent)


@gluon.jit
def step_and_back_prepared(x, beta_s, inverse_s, dtype: gl.constexpr):
    # As `portable.parts.step_and_back`, with beta and 1 / beta (0 where beta is small) in shared memory: read late,
    # they take no registers before.
    columns: gl.constexpr = gl.SliceLayout(0, x.type.layout)
    down = gl.full([x.shape[0]], 1.0, gl.float32, gl.SliceLayout(1, x.type.layout))
    if dtype == gl.float16:
        exponent = gl.max(gl.abs(x), 1).to(gl.int32, bitcast=True) & 0x7F800000
        x = x * (0x7F000000 - exponent).to(gl.float32, bitcast=True)[:, None]
        down = exponent.to(gl.float32, bitcast=True)
    stepped = (x * beta_s.load(columns)[None, :]).to(dtype)
    inverse = inverse_s.load(columns)
    return stepped, gl.where((inverse == 0.0)[None, :], x, stepped.to(gl.float32) * inverse[None, :]), down
