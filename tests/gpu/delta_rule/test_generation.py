"""Test short sequences and single tokens, without gradients."""

import delta_rule_truth as truth
import pytest
import torch
from delta_rule_inputs import BARS
from delta_rule_on_gpu import BF16, FP16, FP32, random
from delta_rule_truth import relative_error
from operator_calls import OperatorCalls

from lrnn.kernels.delta_rule.api import fused_gated_delta_rule, gated_delta_rule


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("T", [1, 2, 16])
def test_recurrence_of_short_sequences(T, dtype):
    x = random(3, T, H=2, HV=4, dtype=dtype, raw=True)
    with torch.no_grad(), OperatorCalls() as calls:
        o, final = fused_gated_delta_rule(**x, output_final_state=True)
    assert list(calls.made) == ["lrnn::gated_delta_rule_recurrent"]
    o_true, final_true = truth.fused_gated_delta_rule(**x, output_final_state=True)
    assert relative_error(o, o_true) < BARS[dtype][""] and relative_error(final, final_true) < 1e-4


def test_generation_continues_the_sequence():
    x = random(2, 150, dtype=FP32)
    o_true, final_true = truth.gated_delta_rule(**x, normalize_qk=True, output_final_state=True)
    state, outputs = x.pop("initial_state"), []
    with torch.no_grad():
        for a, b in [(0, 130), *((t, t + 1) for t in range(130, 150))]:
            part = {n: y[:, a:b] for n, y in x.items()}
            o, state = gated_delta_rule(**part, normalize_qk=True, initial_state=state, output_final_state=True)
            outputs.append(o)
    assert relative_error(torch.cat(outputs, 1), o_true) < 1e-4 and relative_error(state, final_true) < 1e-4
