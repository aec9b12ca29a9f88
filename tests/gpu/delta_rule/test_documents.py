"""Test packed documents."""

import delta_rule_inputs as inputs
import delta_rule_truth as truth
import pytest
import torch
from delta_rule_compare import compare_fused
from delta_rule_inputs import BARS
from delta_rule_on_gpu import BF16, FP32, random
from delta_rule_truth import check, evaluate, evaluate_truth

from lrnn.kernels.delta_rule.api import gated_delta_rule


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_documents(dtype):
    """Test empty documents and ones of one token, across rows of a batch, each with a state and its gradient."""
    bounds = torch.tensor([0, 0, 1, 16, 80, 145, 145, 464, 465, 465, 1000, 2000, 2000], device="cuda")
    for index_dtype in (torch.int32, torch.int64):
        x = random(2, 1000, dtype=dtype, states=len(bounds) - 1, raw=True)
        compare_fused(x, BARS[dtype], f"documents, {dtype}", cu_seqlens=bounds.to(index_dtype))


def test_a_thousand_short_documents():
    lengths = torch.randint(0, 40, (1000,), generator=torch.Generator().manual_seed(0))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().cuda()
    x = random(1, int(bounds[-1]), H=1, K=64, states=1000, raw=True)
    compare_fused(x, BARS[BF16], "1000 documents", cu_seqlens=bounds)


def test_documents_are_independent():
    bounds = torch.tensor([0, 70, 75, 300], dtype=torch.int32, device="cuda")
    x = random(1, 300, states=3)
    do, dstate = inputs.arriving(x)
    for y in (x["q"], x["k"], x["v"], do):
        y[:, 70:75] *= 1000
    expected = evaluate_truth(truth.gated_delta_rule, x, do, dstate, normalize_qk=True, cu_seqlens=bounds)
    found = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=True, cu_seqlens=bounds)
    for i, part in enumerate((slice(0, 70), slice(70, 75), slice(75, 300))):

        def of_document(values, i=i, part=part):
            return {n: y[i] if n in ("final_state", "dinitial_state") else y[:, part] for n, y in values.items()}

        check(of_document(found), of_document(expected), BARS[BF16], f"document {i}")
