"""Remember what the front end of Triton decides by the types of operands, so that its interpreter decides it once.

Each operation in a kernel passes through the front end of the compiler (`TritonSemantic`), which looks at types, shapes
and constants, never at the numbers in a tensor, and calls the builder: for a sum of float16 and float32, say, to widen
one operand, to spread it over the shape of the other, and to add. The interpreter takes these decisions again at every
operation of every program, and they take most of its time.

A plan is the calls of the builder that an operation made for the first operands of these types. It is followed for the
next ones. When it is made, it is followed at once, and must find the same bits as the front end.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from triton.language import core
from triton.runtime import interpreter

Handle, Tensor = interpreter.TensorHandle, core.tensor
semantic = interpreter.interpreter_semantic

BINARY = {
    **{"add": "add", "sub": "sub", "mul": "mul", "truediv": "truediv", "floordiv": "floordiv", "mod": "mod"},
    **{"and": "and_", "or": "or_", "xor": "xor_"},
    **{"lt": "less_than", "le": "less_equal", "gt": "greater_than", "ge": "greater_equal"},
    **{"eq": "equal", "ne": "not_equal"},
}
OPERATIONS = {
    *BINARY.values(),
    *("fdiv", "minimum", "maximum", "minus", "invert", "shl", "ashr", "lshr", "where", "cast", "bitcast", "dot"),
    *("expand_dims", "broadcast_impl_shape", "reshape", "permute", "full", "arange", "load"),
}
CONSTANTS = {f"get_{name}" for name in ("int1", "int8", "int16", "int32", "int64", "fp16", "fp32", "fp64")}
SPREADING = ("create_splat", "create_broadcast")
# NumPy spreads the operands of these over a common shape by itself.
UFUNCS = {
    **{"create_fadd": np.add, "create_fsub": np.subtract, "create_fmul": np.multiply, "create_fdiv": np.divide},
    **{"create_add": np.add, "create_sub": np.subtract, "create_mul": np.multiply, "create_select": np.where},
    **{"create_and": np.bitwise_and, "create_or": np.bitwise_or, "create_xor": np.bitwise_xor},
    **dict.fromkeys(("create_icmpSLT", "create_icmpULT", "create_fcmpOLT"), np.less),
    **dict.fromkeys(("create_icmpSLE", "create_icmpULE", "create_fcmpOLE"), np.less_equal),
    **dict.fromkeys(("create_icmpSGT", "create_icmpUGT", "create_fcmpOGT"), np.greater),
    **dict.fromkeys(("create_icmpSGE", "create_icmpUGE", "create_fcmpOGE"), np.greater_equal),
    **{"create_icmpEQ": np.equal, "create_fcmpOEQ": np.equal},
    **{"create_icmpNE": np.not_equal, "create_fcmpUNE": np.not_equal},
}

_plans: dict[tuple, Callable[[list], Tensor]] = {}
_kinds: dict[tuple, int] = {}


def plan_operations() -> None:
    """Make the interpreter's front end follow plans for the rest of this process."""
    for name in OPERATIONS:
        setattr(semantic, name, _planned(name, getattr(semantic, name)))


def plan_operators() -> None:
    """Make the operators of tensors, which the interpreter has replaced by its own, go to the front end directly."""
    for symbol, name in BINARY.items():
        operation, sanitize = getattr(semantic, name), (False,) if name in ("add", "sub", "mul") else ()
        for reverse in (False, True):
            setattr(Tensor, f"__r{symbol}__" if reverse else f"__{symbol}__", _operator(operation, reverse, sanitize))
    index = Tensor.__getitem__

    def quick_index(self, slices):
        if type(slices) is not tuple or not all(s is None or s == slice(None) for s in slices):
            return index(self, slices)
        for axis, part in enumerate(slices):
            self = semantic.expand_dims(self, axis) if part is None else self
        return self

    Tensor.__getitem__ = quick_index


def _operator(operation: Callable, reverse: bool, more: tuple) -> Callable:
    if reverse:
        return lambda self, other: operation(other.value if type(other) is core.constexpr else other, self, *more)
    return lambda self, other: operation(self, other.value if type(other) is core.constexpr else other, *more)


def _planned(name: str, operation: Callable) -> Callable:
    def run(*args, **options):
        if options or type(semantic.builder) is Recorder:  # inside another operation
            return operation(*args, **options)
        key, handles = [name], []
        for arg in args:
            if type(arg) is Tensor:
                handles.append(arg.handle)
                key.append(arg.__dict__.get("kind") or _kind(arg))
            else:
                key.append(_constant_key(arg))
        plan = _plans.get(key := tuple(key))
        if plan is not None:
            return plan(handles)
        # `load` takes a block of one number for a truth value
        if name == "load" and (not args[0].type.is_block() or args[0].type.numel == 1):
            return operation(*args)
        args = [Tensor(copy.copy(x.handle), x.type) if type(x) is Tensor else x for x in args]
        result, calls = _record(operation, args)
        _plans[key] = make_plan(calls, [x.handle for x in args if type(x) is Tensor], result)
        return result

    return run


def _kind(x: Tensor) -> int:
    """Return one number for the types of a tensor, which decide everything, and keep it in the tensor."""
    key = x.type.name, x.handle.dtype.name, x.handle.data.dtype
    x.kind = _kinds.setdefault(key, len(_kinds) + 1)
    return x.kind


def _constant_key(x: Any) -> Any:
    """Return what tells a constant from all others: 0.0 equals -0.0, 0 and False, but is none of them."""
    if type(x) is core.constexpr:
        x = x.value
    if type(x) is float:
        return float, repr(x)
    if isinstance(x, core.dtype):
        return x.name
    if isinstance(x, (list, tuple, core.tuple)):
        return tuple(_constant_key(y) for y in x)
    return type(x), x


class Recorder:
    """The interpreter's builder, with a list of its calls: (method, arguments, result)."""

    def __init__(self, builder: interpreter.InterpreterBuilder):
        self.builder, self.options, self.codegen_fns = builder, builder.options, builder.codegen_fns
        self.calls: list[tuple[str, tuple, Any]] = []

    def __getattr__(self, name: str) -> Callable:
        method = getattr(self.builder, name)

        def call(*args):
            result = method(*args)
            self.calls.append((name, args, result))
            return result

        return call


def _record(operation: Callable, args: list) -> tuple[Any, list]:
    semantic.builder = recorder = Recorder(semantic.builder)
    try:
        return operation(*args), recorder.calls
    finally:
        semantic.builder = recorder.builder


def make_plan(calls: list, operands: list, result: Tensor) -> Callable[[list], Tensor]:
    """Return a function that makes the recorded calls for other operands of the same types."""
    _kind(result)
    like = {name: x for name, x in vars(result).items() if name != "handle"}
    plans = [_call_all(_steps(calls, operands, result.handle, skipped), like) for skipped in (SPREADING, ())]
    steps = _steps(calls, operands, result.handle, SPREADING)
    if len(steps) == 1 and steps[0][0] in UFUNCS:
        plans.insert(0, _call_ufunc(steps[0], like, len(operands), result.handle.dtype))
    for plan in plans:  # the fastest one that gives the same bits in the same order in memory
        if _same(plan(operands).handle.data, result.handle.data):
            return plan
    raise AssertionError("the front end did not decide by types and constants alone")


def _same(x: np.ndarray, y: np.ndarray) -> bool:
    return (x.dtype, x.shape, x.strides) == (y.dtype, y.shape, y.strides) and x.tobytes() == y.tobytes()


def _tensor(like: dict, handle: Handle) -> Tensor:
    tensor = Tensor.__new__(Tensor)
    tensor.__dict__ = {**like, "handle": handle}
    return tensor


def _call_ufunc(step: tuple, like: dict, operands: int, dtype: core.dtype) -> Callable[[list], Tensor]:
    name, args, places = step
    function, numbers = UFUNCS[name], dict(places)
    constants = [x for place, x in enumerate(args) if place not in numbers]
    constant = iter(range(operands, operands + len(constants)))
    numbers = [numbers[place] if place in numbers else next(constant) for place in range(len(args))]

    def plan(handles: list) -> Tensor:
        values = handles + constants
        handle = Handle.__new__(Handle)
        handle.data, handle.dtype, handle.attr = function(*[values[n].data for n in numbers]), dtype, {}
        return _tensor(like, handle)

    return plan


def _call_all(steps: list, like: dict) -> Callable[[list], Tensor]:
    builder = interpreter.interpreter_builder

    def plan(handles: list) -> Tensor:
        values = handles.copy()
        for name, args, places in steps:
            args = args.copy()
            for place, number in places:
                args[place] = values[number]
            values.append(getattr(builder, name)(*args))  # looked up at every call, since tests replace methods
        return _tensor(like, values[-1])

    return plan


def _steps(calls: list, operands: list, result: Handle, skipped: tuple[str, ...]) -> list:
    """Return the calls that the result needs, as (method, arguments, [(place of an argument, number of a value)]).

    The values are the operands and then the results of the calls. Elementwise calls take the arguments of skipped calls
    in place of their results. Constants are made once.
    """
    makers = {id(made): (name, args) for name, args, made in calls}
    numbers = {id(operand): number for number, operand in enumerate(operands)}
    steps: list = []

    def is_constant(x) -> bool:
        if not isinstance(x, Handle):
            return True
        name, args = makers.get(id(x), ("", ()))
        return name in CONSTANTS or (name == "create_splat" and is_constant(args[1]))

    def unspread(x):
        name, args = makers.get(id(x), ("", ()))
        return next(a for a in args if isinstance(a, Handle)) if name in skipped else x

    def add(handle) -> None:
        name, args = makers[id(handle)]
        if name in UFUNCS:
            args = [unspread(x) for x in args]
        for x in args:
            if not is_constant(x) and id(x) not in numbers:
                add(x)
        places = [(place, numbers[id(x)]) for place, x in enumerate(args) if not is_constant(x)]
        numbers[id(handle)] = len(operands) + len(steps)
        steps.append((name, list(args), places))

    if id(result) not in numbers:
        add(result)
    return steps
