"""Remove useless work from Triton's interpreter. No number changes.

This work takes nine tenths of a kernel's time:
- Each sum and product of integers is computed again in 64 bits and compared with the limits of its type. This is for an
  assertion that only `debug` makes, which the interpreter has turned off.
- Each call of a device function replaces all of `triton.language` by the interpreter's functions and looks through
  every member of the modules for that, although the launch has already done so.
- Each look-up of a NumPy type makes a dictionary of all types.
- Each value makes the tuples of its shape, and their types, from the start, although few shapes occur.
- Each operation is decided by the types of its operands again; see interpreter_plans.py.
"""

import dataclasses

from interpreter_plans import plan_operations, plan_operators
from triton.language import core
from triton.runtime import interpreter


def quicken() -> None:
    """Apply for the rest of this process, in which `triton.language` then remains the interpreter's."""
    _remember_shapes()
    builder, patch = interpreter.interpreter_builder, interpreter._patch_lang
    assert not builder.options.debug, "the interpreter looks at what it is spared here"
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    patched = set()

    def patch_once(fn):
        module = fn.__globals__["__name__"]
        if module not in patched:
            patch(fn)  # the object that it returns could undo it
            if not patched:
                plan_operators()
            patched.add(module)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
    look_up, known = interpreter._get_np_dtype, {}

    def look_up_once(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = look_up_once
    plan_operations()


def _remember_shapes() -> None:
    """Make the attributes of a block type, and of a tensor, that follow from a shape once per shape."""
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    attributes: dict[tuple, dict] = {}
    shapes: dict[tuple, dict] = {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, *[s.value if isinstance(s, core.constexpr) else s for s in shape]
        if key not in attributes:
            make_type(self, element_ty, shape)
            attributes[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        self.element_ty = element_ty
        vars(self).update(attributes[key])

    def tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = {name: vars(self)[name] for name in ("shape", "numel")}
        self.handle, self.type, self.dtype = handle, type, type.scalar
        vars(self).update(shapes[key])

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
