"""Fill new memory with NaN, so that a kernel that reads it before it is written fails its test."""

import pytest
import torch


def fill_new_buffers_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty and its relatives return NaN in tensors of a float dtype until the test ends.

    The allocator often returns zeros or an older result of the same test. A kernel that leaves a part of its output
    unwritten, or multiplies a value that it should not have read by 0, would then pass.
    """

    def filled(function):
        def wrapper(*args, **kwargs):
            x = function(*args, **kwargs)
            with torch.no_grad():  # some of torch's own code creates an empty leaf that requires gradients
                return x.fill_(float("nan")) if x.is_floating_point() else x

        return wrapper

    for holder, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(holder, name, filled(getattr(holder, name)))
