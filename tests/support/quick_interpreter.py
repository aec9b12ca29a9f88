"""Remove useless work from Triton's interpreter. No number changes.

This work takes half of a kernel's time:
- Each sum and product of integers is computed again in 64 bits and compared with the limits of its type. This is for an
  assertion that only `debug` makes, which the interpreter has turned off.
- Each call of a device function replaces all of `triton.language` by the interpreter's functions and looks through
  every member of the modules for that, although the launch has already done so.
- Each look-up of a NumPy type makes a dictionary of all types.
"""

import dataclasses

from triton.runtime import interpreter


def quicken() -> None:
    """Apply for the rest of this process, in which `triton.language` then remains the interpreter's."""
    builder, patch = interpreter.interpreter_builder, interpreter._patch_lang
    assert not builder.options.debug, "the interpreter looks at what it is spared here"
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    patched = set()

    def patch_once(fn):
        module = fn.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            patch(fn)  # the object that it returns could undo it
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
    look_up, known = interpreter._get_np_dtype, {}

    def look_up_once(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = look_up_once
