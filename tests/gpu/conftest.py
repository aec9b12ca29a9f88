import os

import pytest
import torch

REHEARSED = os.environ.get("LRNN_REHEARSE") == "1"  # runs the tests of `recipes` in small on a CPU


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in str(item.path) and not (REHEARSED and "tests/gpu/recipes" in str(item.path)):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def flas_first_configuration():
    """Make fla's kernels take the first configuration that compiles and runs, instead of trying up to 48 each.

    A configuration is a choice of tiles, warps and stages. It affects the speed and the last bits, not the function.
    Trying them all takes longer than the tests.
    """
    if not torch.cuda.is_available():
        yield
        return
    from triton.runtime.autotuner import Autotuner

    prune, bench = Autotuner.prune_configs, Autotuner._bench
    found = set()  # autotuners that have a configuration for the current key

    def prune_configs(self, kwargs):  # called before a search
        found.discard(self)
        return prune(self, kwargs)

    def first_that_runs(self, *args, config, **meta):
        if self in found:
            return [float("inf")] * 3  # triton's own result for a configuration that does not run
        times = bench(self, *args, config=config, **meta)
        if self.base_fn.__module__.startswith("fla.") and times[0] < float("inf"):
            found.add(self)
        return times

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autotuner, "prune_configs", prune_configs)
        patch.setattr(Autotuner, "_bench", first_that_runs)
        yield
