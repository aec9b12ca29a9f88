"""`tests/benchmarks/compile_ahead.py` without a GPU: which kernels it asks for, and keys of another Triton's cache."""

import hashlib
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import autotuner, cache

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import compile_ahead

from lrnn.kernels.delta_rule.hopper import backend
from lrnn.pretrain.config import load_config, load_model_of

CPU = torch.device("cpu")
SMALL = ["model.vocab_size=500", "model.hidden_size=64", "model.intermediate_size=64", "micro_batch_size=2"]
SMALL += ["global_batch_size=2", "data.seq_len=128"]
BOTH = ("forward", "backward")
# What layers launch besides the delta rule, fused and plain, read in `pretrain/fused` and `lrnn/model/layers.py`.
PLAIN = {*(f"short_conv_{x}_kernel" for x in BOTH), *(f"gated_rms_norm_{x}_kernel" for x in BOTH)}
PLAIN |= {"gate_backward_kernel", "rms_norm_forward_kernel", "swiglu_forward_kernel"}  # two without gradients alone
FUSED = PLAIN | {"rms_norm_backward_kernel", "swiglu_backward_kernel", "cross_entropy_kernel"}
PORTABLE = {f"chunk_{x}_kernel" for x in ("inverse", "forward", "scan_backward", "backward")}
HOPPER = {name.replace("_kernel", "_hopper_kernel") for name in PORTABLE}


class Noted:
    """In place of threads: notes the functions that would compile, and calls none."""

    def __init__(self):
        self.functions = []

    def submit(self, function):
        self.functions.append(function)
        return SimpleNamespace(result=lambda: None)

    def targets(self):
        """Return the targets that the functions would compile for."""
        cells = [dict(zip(f.__code__.co_freevars, f.__closure__, strict=True)) for f in self.functions]
        return {str(cell["target"].cell_contents) for cell in cells}


@pytest.fixture
def asked(monkeypatch):
    """`asked(*overrides)` returns the compilation of a run of which nothing was compiled."""
    monkeypatch.setattr(backend, "ptxas_version", lambda: (13, 5))

    def make(*overrides):
        compilation = compile_ahead.Compilation(1)
        compilation.mode.executor = Noted()
        config = load_config("tiny", [*SMALL, *overrides])
        with ExitStack() as exits:
            compile_ahead.without_gpu(exits)
            exits.enter_context(compilation.instead_of_launches())
            compile_ahead.go_through(config, load_model_of(config), CPU)
        return compilation

    return make


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["precision=bfloat16", "model.head_dim=128"], FUSED | HOPPER),
        (["precision=bfloat16"], FUSED | PORTABLE),
        (["precision=float32"], PLAIN | PORTABLE),
        (["precision=bfloat16", "fused_layers=false"], PLAIN | PORTABLE),
        (["precision=bfloat16", "model.head_dim=128", "data.reset_at_document_boundaries=true"], FUSED | PORTABLE),
    ],
)
def test_kernels_of_a_step(asked, overrides, names):
    compilation = asked(*overrides)
    assert compilation.launched == names
    (target,) = compilation.mode.executor.targets()
    assert "arch=90" in target
    assert len(compilation.mode.executor.functions) >= len(names)


def test_states_ahead_of_samples_are_other_kernels(asked):
    """Without them a scan has no first state, which is a kernel of its own."""
    plain, passing = (asked("precision=bfloat16", *x).mode.raw_futures for x in ([], ["data.state_passing=2"]))
    assert {future._key for future in passing} - {future._key for future in plain}


def test_the_key_of_an_unpacked_wheel(tmp_path):
    """It is this Triton's own for a copy of it, and another one after a change of a file."""
    copy = tmp_path / "triton"
    ours = Path(triton.__file__).parent
    for folder in ("compiler", "backends", "language", "_C", "runtime"):
        shutil.copytree(ours / folder, copy / folder, copy_function=lambda a, b: Path(b).symlink_to(a))
    shutil.copy(ours / "__init__.py", copy)
    assert compile_ahead.triton_key(tmp_path) == cache.triton_key()
    changed = copy / "language" / "core.py"
    text = changed.read_text()
    changed.unlink()
    changed.write_text(text + "\n")
    assert compile_ahead.triton_key(tmp_path) != cache.triton_key()
    (copy / "__init__.py").write_text("__version__ = '3.0.0'\n")
    with pytest.raises(SystemExit, match=rf"it is Triton 3.0.0, and this is {triton.__version__}"):
        compile_ahead.triton_key(tmp_path)


def test_a_cache_is_moved(tmp_path):
    """The entry that is read elsewhere names its files there. Intermediate code is left behind."""
    key = hashlib.sha256(b"kernel").hexdigest()
    name, metadata = "kernel.cubin", "kernel.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path / "here"))
        manager = cache.FileCacheManager(key)
        files = {file: manager.put(file, file, binary=False) for file in ("kernel.ptx", name, metadata)}
        manager.put_group(metadata, files)
        (tmp_path / "here" / "lock").touch()
        compile_ahead.pack(tmp_path / "here", tmp_path / "cache.tar.xz")
        (tmp_path / "here").rename(tmp_path / "gone")
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path / "there"))
        compile_ahead.unpack(tmp_path / "cache.tar.xz", tmp_path / "there")
        found = cache.FileCacheManager(key).get_group(metadata)
    assert found.keys() == {name, metadata}
    assert {Path(path).read_text() for path in found.values()} == {name, metadata}
    assert compile_ahead.entries(tmp_path / "there") == {Path(found[name]).parent.name}


def test_configurations_that_a_tuner_tries(asked):
    """A tuner with a `run` of its own, as fla has one, asks for each configuration."""

    class Other(autotuner.Autotuner):
        def run(self, *args, **kwargs):
            raise AssertionError("it should not measure")

    @triton.jit
    def kernel(x, BLOCK: tl.constexpr):
        tl.store(x, BLOCK)

    configs = [triton.Config({"BLOCK": size}) for size in (1, 2, 4)]
    tuner = Other(kernel, kernel.arg_names, configs, [], None, None)
    compilation = compile_ahead.Compilation(1)
    compilation.mode.executor = Noted()
    with ExitStack() as exits:
        compile_ahead.without_gpu(exits)
        exits.enter_context(compilation.instead_of_launches())
        tuner[(1,)](torch.zeros(4))
    assert len(compilation.mode.executor.functions) == 3 and compilation.launched == {"kernel"}
