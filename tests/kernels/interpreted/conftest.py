"""Test the Triton kernels on a CPU, in Triton's interpreter. `tests/kernels/test_interpreted.py` runs these tests.

Triton reads TRITON_INTERPRET when a kernel is defined, so it must be set before anything of this project is imported:

    TRITON_INTERPRET=1 pytest tests/kernels/interpreted

The interpreter's bfloat16 is wrong, because it computes with the bits as integers. Only float16 and float32 are tested
here, except in `test_split_precision.py`, which fixes it.
"""

import os

import pytest
from nan_buffers import fill_new_buffers_with_nan

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import torch
    import triton.language as tl
    from quick_interpreter import quicken
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor, scope):
        _patch_tensor(tensor, scope)
        # Loops over range(n) ask for n.__index__(). Before 3.9 Triton makes the integer from an array of one element,
        # which NumPy refuses from 2.4 on.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    _convert_float = interpreter._convert_float

    def _convert_float_rounding(x, source, target, rounding_mode):
        # The interpreter's float8 is half of what it should be where rounding carries into the exponent.
        if source != tl.float32 or target != tl.float8e4nv:
            return _convert_float(x, source, target, rounding_mode)
        return torch.from_numpy(np.ascontiguousarray(x)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = _convert_float_rounding
    interpreter._patch_lang_tensor = _patch_tensor_and_index
    quicken()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def nan_buffers(monkeypatch):
    fill_new_buffers_with_nan(monkeypatch)
