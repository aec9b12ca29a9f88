"""Test what the records of a run say of its training, and of the eigenvalues of its layers."""

import numpy as np
import pytest
import torch
from torch import nn

from lrnn.errors import UserError
from lrnn.ladder.measure.training import eigenvalues, quantile, training_facts
from lrnn.ladder.measures import FACTS
from lrnn.pretrain.metrics.eigenvalues import EIGENVALUE_BINS, EigenvalueProbe


def at(second: int) -> str:
    return f"2026-11-29T10:{second // 60:02}:{second % 60:02}.000+00:00"


def start(second: int, step: int, processes: int):
    return {"event": "start", "step": step, "processes": processes, "resumed": step > 0, "time": at(second)}


def step(second: int, number: int, speed: float, **more):
    record = {"step": number, "loss": 10.0 - number, "tokens_per_second_per_gpu": speed, "memory_gb": 1.0 + number}
    return record | {"skipped_steps": number // 2, "eigenvalues": {}, "time": at(second)} | more


RECORDS = [
    start(0, 0, 1),
    step(30, 1, 100.0),
    step(40, 2, 900.0),
    {"event": "loss_spike", "step": 3, "loss": "inf", "outcome": "skipped", "time": at(50)},
    # A pause of ten minutes, after which two processes resume at step 1.
    start(650, 1, 2),
    step(660, 2, 800.0, memory_gb=2.5),
    {"step": 3, "heldout_loss": 5.0, "time": at(665)},
    step(670, 4, 1000.0, memory_gb=0.5),
    {"event": "checkpoint", "step": 4, "time": at(690)},
]


def test_facts_of_a_training():
    facts = training_facts(RECORDS)
    assert facts.keys() == FACTS.keys() - {"measuring_gpu_seconds"}
    assert facts["seconds"] == 50 + 40 and facts["gpu_seconds"] == 50 + 2 * 40
    assert training_facts(RECORDS, at_once=2)["gpu_seconds"] == 65
    assert facts["tokens_per_second"] == np.median([100, 900, 2 * 800, 2 * 1000])
    assert facts["peak_gb"] == 2.5  # the second step was done twice
    assert (facts["loss"], facts["spikes"], facts["skipped_steps"]) == (6.0, 1, 2)


def test_a_run_without_steps_has_no_facts():
    with pytest.raises(UserError, match="hold no step"):
        training_facts(RECORDS[:1])


def histograms(values: torch.Tensor) -> dict:
    """Return what a run records of two layers that have these eigenvalues, and half of them."""
    probe = EigenvalueProbe(nn.Identity())
    probe._counts = {0: values, 2: values}  # it names the layers by these
    both = [torch.histc(v, EIGENVALUE_BINS, -1, 1) for v in (values, values / 2)]
    return probe.describe(torch.stack(both))


def test_eigenvalues_by_layer_against_the_values_themselves():
    torch.manual_seed(0)
    early, late = 0.9 + 0.1 * torch.rand(9999), torch.tanh(torch.randn(9999))
    records = [
        step(number, number, 1.0, eigenvalues=histograms(early if number < 50 else late)) for number in range(1, 101)
    ]
    found = {(f.measure, f.of, f.at): f.value for f in eigenvalues(records, 3)}
    assert {at for _, _, at in found} == {1, 50, 100} and {of for _, of, _ in found} == {"layer 0", "layer 2"}
    for at_step, values in ((1, early), (100, late)):
        for layer, of_layer in (("layer 0", values), ("layer 2", values / 2)):
            assert found["negative_eigenvalues", layer, at_step] == pytest.approx(
                (of_layer < 0).float().mean().item(), abs=1e-4
            )
            for measure, share in (("smallest_eigenvalue", 0.01), ("median_eigenvalue", 0.5)):
                assert found[measure, layer, at_step] == pytest.approx(of_layer.quantile(share).item(), abs=0.06)
    assert {f.at for f in eigenvalues(records, 1)} == {100}
    assert eigenvalues(RECORDS, 3) == [] == eigenvalues(records, 0)


def test_quantiles_of_even_bins_are_exact():
    even = [1 / 20] * 20
    assert [quantile(even, share) for share in (0.01, 0.5, 0.99)] == pytest.approx([-0.98, 0.0, 0.98])
    gap = [0.0] * 5 + [0.25] + [0.0] * 13 + [0.75]  # 0.25 in [-0.5, -0.4), and 0.75 in [0.9, 1]
    assert [quantile(gap, share) for share in (0.125, 0.25 + 0.375)] == pytest.approx([-0.45, 0.95])
