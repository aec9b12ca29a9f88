"""`lrnn bench kernels` without a GPU: the options that it refuses, and the parts that need no GPU."""

import pytest
import torch

from lrnn.bench import kernels as bench_kernels
from lrnn.bench import peers
from lrnn.cli import main
from lrnn.model.mixer_deltanet import HeadSizes


@pytest.mark.skipif(torch.cuda.is_available(), reason="would start the measurement")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "GPU"),
        (["--shapes", "8y4096"], "8x4096"),
        (["--shapes", "0x64"], "'0x64'"),
        (["--heads", "2", "--value-heads", "3"], "--value-heads 3 should be a multiple of --heads 2"),
        (["--value-heads", "0"], "should be at least 1"),
        (["--only", "lrnn", "fla"], "--only 'fla' is none of ours; give some of 'lrnn', 'lrnn split'"),
        (["--value-size", "257"], "head sizes up to 256; got 128 for keys and 257 for values"),
    ],
)
def test_refusals(options, message, capsys):
    assert main(["bench", "kernels", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lrnn: error: ") and message in error


@pytest.mark.parametrize("run", [bench_kernels.ours, bench_kernels.ours_split, bench_kernels.ours_saved])
def test_both_passes_reach_every_input(run):
    x = bench_kernels.make_inputs(1, 20, 2, 12, device="cpu", value_heads=4, value_size=24)
    forward, both = bench_kernels.passes(run, x)
    assert forward().shape == x["v"].shape
    assert [dx.shape for dx in both()] == [y.shape for y in x.values()]
    assert all(dx.abs().max() > 0 for dx in both())


def test_log_inputs_are_the_same_function():
    """The inputs of FlashQLA have the same gates and step sizes as the raw projections."""
    from lrnn.kernels.delta_rule.api import gated_delta_rule

    x = bench_kernels.make_inputs(1, 20, 2, 64, device="cpu")
    o, _ = gated_delta_rule(**peers.make_log_inputs(x), normalize_qk=True)
    torch.testing.assert_close(o, bench_kernels.ours(x))


def test_the_floor():
    """At 3 TB/s and the first shape, reading q, k, v and writing o takes 0.18 ms, and backward takes 0.31 ms."""
    forward, both = bench_kernels.floor_milliseconds(8 * 4096, HeadSizes.equal(16, 128), 3e12)
    assert forward == pytest.approx(0.18, abs=0.005) and both - forward == pytest.approx(0.31, abs=0.01)


def test_the_guard_of_fla_is_restored():
    from fla.ops.common import chunk_o

    before = chunk_o.TRITON_ABOVE_3_7_1
    with peers.fla_guard_lifted():
        assert chunk_o.TRITON_ABOVE_3_7_1
    assert before == chunk_o.TRITON_ABOVE_3_7_1


def test_tilelang_avoids_the_guard_of_fla(monkeypatch):
    """With tilelang, fla refuses nothing on Hopper, unless tilelang is forbidden."""
    from fla.ops.common import chunk_o

    for name, value in (("IS_NVIDIA_HOPPER", True), ("TRITON_ABOVE_3_4_0", True), ("TRITON_ABOVE_3_7_1", False)):
        monkeypatch.setattr(chunk_o, name, value)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("FLA_TILELANG", raising=False)
    assert peers.fla_guard() is None
    monkeypatch.setenv("FLA_TILELANG", "0")
    assert "timed for speed only" in peers.fla_guard()
