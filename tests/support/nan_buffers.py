"""Memory that nobody has written yet reads as NaN, so that a kernel that reads it shows."""

import pytest
import torch


def fill_new_buffers_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, torch.empty and its relatives return NaN in tensors of a float dtype.

    The allocator often returns zeros or an older result of the same test: a kernel that leaves a part of its output
    unwritten, or multiplies what it should not have read by 0, would pass.
    """

    def filled(function):
        def wrapper(*args, **kwargs):
            x = function(*args, **kwargs)
            with torch.no_grad():  # some of torch's own code asks for an empty leaf that requires gradients
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
