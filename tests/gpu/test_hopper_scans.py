"""The scans in Gluon beside the plain ones: the same equations and roundings, so nearly the same numbers.

What both compute is compared with a float64 recurrence in `test_gated_delta_rule.py`, which runs the scans in Gluon
wherever chunks are full and heads of size 128.
"""

import delta_rule_inputs as inputs
import pytest
import torch
from delta_rule_truth import evaluate, relative_error

from lrnn.kernels import scans
from lrnn.kernels.gated_delta_rule import gated_delta_rule
from lrnn.kernels.launch_config import SAFE_PTXAS, ptxas_version

PLAIN = {"chunk_forward_kernel", "chunk_scan_backward_kernel"}
GLUON = {"chunk_forward_hopper_kernel", "chunk_scan_backward_hopper_kernel"}


@pytest.fixture
def launched(monkeypatch):
    names, launch = [], scans.launch

    def note(kernel, *args, **constants):
        names.append(kernel.__name__)
        launch(kernel, *args, **constants)

    monkeypatch.setattr(scans, "launch", note)
    return names


# one program a head with all its values (H * B >= 100), one for each half, and segments whose transitions are joined
@pytest.mark.parametrize("sizes", [(2, 64, 1, 1), (2, 512, 2, 4), (7, 256, 16, 16), (1, 8192, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("precision", ["standard", "split"])
def test_scans_in_gluon_are_the_plain_ones(sizes, dtype, normalize, precision, launched, monkeypatch):
    B, T, H, HV = sizes
    x = inputs.random(B, T, H, K=128, HV=HV, device="cuda", dtype=dtype)
    x = x if normalize else inputs.unit_keys(x)  # longer keys would make the state grow
    if ptxas_version() < SAFE_PTXAS:
        pytest.skip(f"with ptxas {ptxas_version()} the scans in Gluon are not used")
    do, dstate = inputs.arriving(x)
    gluon = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=normalize, precision=precision)
    assert not PLAIN & set(launched) and set(launched) >= GLUON
    launched.clear()
    monkeypatch.setattr(scans, "is_for_hopper", lambda *a: False)
    plain = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=normalize, precision=precision)
    assert not GLUON & set(launched) and set(launched) >= PLAIN
    assert gluon.keys() == plain.keys()
    errors = {name: relative_error(gluon[name], plain[name]) for name in plain}
    print(errors)
    # A sum in another order moves a last bit of a 16-bit state here and there.
    bar = 5e-3 if dtype == torch.bfloat16 else 1e-3
    assert max(errors.values()) < bar, errors
