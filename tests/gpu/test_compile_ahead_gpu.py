"""`tests/benchmarks/compile_ahead.py` on a GPU: a training step afterwards finds every kernel in the cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compile_ahead.py"
FIXED = ["precision=bfloat16", "micro_batch_size=4", "global_batch_size=8"]


@pytest.mark.parametrize(
    "changes",
    [[], ["model.head_dim=128", "model.num_heads=2"], ["data.reset_at_document_boundaries=true"]],
    ids=lambda changes: " ".join(changes) or "as it is",
)
def test_a_step_compiles_nothing_more(changes, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}

    def run(*command):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        print(done.stdout)
        return {path.parent.name for path in tmp_path.glob("*/*.cubin")}

    before = run(SCRIPT, " ".join(["tiny", *FIXED, *changes]))
    after = run("-m", "lrnn.cli", "bench", "step", "tiny", *FIXED, *changes, "--only-ours")
    more = sorted(path.name for key in after - before for path in (tmp_path / key).glob("*.cubin"))
    assert len(before) >= 12 and not more
