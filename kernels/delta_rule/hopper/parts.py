"""Parts that kernels in Gluon share: its names in several versions of Triton, barriers, vectors in shared memory, P.

Gluon is experimental and renames its functions. `thread_barrier` became `barrier` in Triton 3.7, the copies of the TMA
became `async_load` and `async_store` in 3.8, and `_reinterpret` became `reinterpret` in 3.9. Each name is therefore
looked up by itself. `aggregate` is in Gluon since 3.8; before, Triton keeps it elsewhere and writes no constructor.

A class under `aggregate` groups values that a kernel passes around: buffers, barriers, tensors and constants. When it
is compiled its fields are separate values, so it costs nothing. Its methods are functions under `gluon.jit`.
"""

from typing import Any, TypeAlias, TypeVar, dataclass_transform

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from lrnn.kernels.common.constants import CHUNK, LEAST_KEPT, LEAST_KEPT_FP16, SMALL_BETA
from lrnn.kernels.common.tiles import SpacedTiles, Tiles
from lrnn.kernels.delta_rule.call import Call

T = TypeVar("T")


def _named(owner: Any, *names: str) -> Any:
    # Return the object with the first existing name. The new one comes first, as the old one may only raise an error.
    return next(getattr(owner, name) for name in names if hasattr(owner, name))


def _aggregate_before_38(cls: type) -> Any:
    # `gluon.aggregate` with the constructor that Triton 3.8 and later write: it takes fields by position or by name.
    from triton.language.core import _aggregate

    names = list(cls.__annotations__)

    def init(self, *args, **fields):
        fields |= zip(names, args, strict=False)
        for name in names:
            value = fields.pop(name)
            setattr(self, name, value if hasattr(value, "_flatten_ir") else gl.constexpr(value))
        assert not fields, f"{cls.__name__} has no {', '.join(fields)}"

    init.__triton_builtin__ = True  # type: ignore[attr-defined]
    cls.__init__ = init  # type: ignore[misc]
    return _aggregate(cls)


@dataclass_transform(eq_default=False)
def aggregate(cls: type[T]) -> type[T]:
    """`gluon.aggregate`, in every version of Triton."""
    return getattr(gluon, "aggregate", _aggregate_before_38)(cls)


part_barrier = _named(gl, "barrier", "thread_barrier")  # of the warps of one part
tma_load = _named(tma, "async_load", "async_copy_global_to_shared")
tma_store = _named(tma, "async_store", "async_copy_shared_to_global")
_HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))  # of a vector in shared memory

# Types of fields. A field that a kernel does not need is None, which is a constant when compiled.
Buffer: TypeAlias = gl.shared_memory_descriptor
OptionalBuffer = gl.shared_memory_descriptor | gl.constexpr
OptionalMatrix = tma.tensor_descriptor | gl.constexpr
OptionalPointer = gl.tensor | gl.constexpr


@aggregate
class Phases:
    """Barriers of slots that are used in turn: use i is in slot i % slots, and ends with the phase of its barrier."""

    barriers: Buffer  # [slots, 1]
    slots: gl.constexpr

    @gluon.jit
    def of(self, i):
        # the barrier of use i
        return self.barriers.index(i % self.slots)

    @gluon.jit
    def wait(self, i):
        # until the phase of use i is over
        mbarrier.wait(self.of(i), (i // self.slots) & 1)

    @gluon.jit
    def wait_for_previous(self, i):
        # until the phase of the use before i of the same slot is over: at once where there is none
        mbarrier.wait(self.of(i), ((i // self.slots) & 1) ^ 1)

    @gluon.jit
    def arrive(self, i, count: gl.constexpr = 1):
        mbarrier.arrive(self.of(i), count=count)


@gluon.jit
def allocate_barriers(count: gl.constexpr):
    return gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())


@aggregate
class ScanBarriers:
    """Barriers of a scan over chunks. Its parts are one that loads, one that prepares, and the state's, of which each
    carries a half of the values or all of them."""

    ready: Phases  # all tiles of a chunk are loaded
    early: Phases  # the state's parts and the preparing one are done with tiles that are not kept to the end
    free: Phases  # they are done with the others too
    p_ready: Phases  # the prepared data of a chunk is there, in one of two slots
    p_free: Phases  # the state's parts are done with it


@gluon.jit
def make_scan_barriers(STAGES: gl.constexpr, HALVES: gl.constexpr):
    ready, early, free = allocate_barriers(STAGES), allocate_barriers(STAGES), allocate_barriers(STAGES)
    p_ready, p_free = allocate_barriers(2), allocate_barriers(2)
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(early.index(s), count=HALVES + 1)
        mbarrier.init(free.index(s), count=HALVES + 1)
    for s in gl.static_range(2):
        mbarrier.init(p_ready.index(s), count=1)
        mbarrier.init(p_free.index(s), count=HALVES)
    fence_async_shared()
    part_barrier()
    return ScanBarriers(
        Phases(ready, STAGES), Phases(early, STAGES), Phases(free, STAGES), Phases(p_ready, 2), Phases(p_free, 2)
    )


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


def token_tiles(call: Call, x: Tensor, columns: int) -> Tiles:
    """Return the tiles of a tensor by token, [B, T / factors, H, D], for `load_by_token` and `store_by_token`."""
    if call.factors == 1:
        return Tiles(x, CHUNK, columns)
    return SpacedTiles(x, CHUNK, columns, call.factors)


@gluon.jit
def _by_token(tile, matrix, FACTORS: gl.constexpr):
    tokens: gl.constexpr = tile.shape[0] // FACTORS
    columns: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = matrix.layout  # Triton 3.6 passes on no layout that is not a constant
    return reinterpret(tile, matrix.dtype, [tokens, FACTORS, columns], layout)


@gluon.jit
def load_by_token(matrix, row, column, bar, tile, FACTORS: gl.constexpr):
    # The rows of a chunk's tokens to the tile's rows of their first steps, and zeros to the others. `row` is a step's.
    if FACTORS == 1:
        tma_load(matrix, [row, column], bar, tile)
    else:
        tma_load(matrix, [row // FACTORS, 0, column], bar, _by_token(tile, matrix, FACTORS))


@gluon.jit
def store_by_token(matrix, row, column, tile, FACTORS: gl.constexpr):
    # The tile's rows of the tokens' first steps. The others are not stored.
    if FACTORS == 1:
        tma_store(matrix, [row, column], tile)
    else:
        tma_store(matrix, [row // FACTORS, 0, column], _by_token(tile, matrix, FACTORS))


@gluon.jit
def last_steps(rows, FACTORS: gl.constexpr):
    # The last step of each row's token, after which its query reads. The gates up to there are those up to the row.
    if FACTORS == 1:
        return rows
    else:
        return rows // FACTORS * FACTORS + (FACTORS - 1)


@gluon.jit
def weigh_keys(q_tile, k_tile, to_query, from_key, rows, columns, tile: gl.constexpr, BT: gl.constexpr):
    # P = scale tril(G . Q^ K^T r): all factors but Q K^T as exponents, by row `to_query`, by column `-from_key`. `rows`
    # are `last_steps`. The exponent is masked, since above the diagonal it would overflow.
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
