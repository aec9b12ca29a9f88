"""Triton's interpreter without work that it does for nothing; every number stays what it was.

It takes half of the time of a kernel:
- Each sum and product of integers is computed once more in 64 bits and compared with the limits of its type, for an
  assertion that `debug` alone makes, and the interpreter has that off.
- Each call of a device function replaces all of `triton.language` by what the interpreter has for it, though the launch
  has done so, and looks through every member of the modules for that.
- Each look-up of a NumPy type makes a dictionary of all.
"""

import dataclasses

from triton.runtime import interpreter


def quicken() -> None:
    """For the rest of this process, in which `triton.language` then stays the interpreter's."""
    builder, patch = interpreter.interpreter_builder, interpreter._patch_lang
    assert not builder.options.debug, "the interpreter looks at what it is spared here"
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    patched = set()

    def patch_once(fn):
        module = fn.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            patch(fn)  # what it returns could undo it
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
    look_up, known = interpreter._get_np_dtype, {}

    def look_up_once(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = look_up_once
