"""Compile the Triton kernels of given runs on all cores, before anything is measured, with a GPU or without one.

    python tests/benchmarks/compile_ahead.py "340m" "1.3b micro_batch_size=4 data.reset_at_document_boundaries=true"
    python tests/benchmarks/compile_ahead.py --heads 30x128x256 30x96x192 --shapes 8x4096
    python tests/benchmarks/compile_ahead.py --fla "340m"                 also those of fla's model, all that it tries

A run compiles a kernel when it first launches it, one after the other, which takes minutes. Here one micro-batch of a
model with one layer of each kind goes through both passes, and through a pass without gradients. Each launch only asks
for the kernel to be compiled, by a thread of its own, and computes nothing. The kernels land in Triton's cache
(TRITON_CACHE_DIR), where every process on this machine finds them.

Without a GPU, they are compiled for an H200 or H100 (sm_90a). The cache fits another machine if Triton's own files and
ptxas are the same there, byte by byte. The files depend on the version of Python. `--triton FOLDER` names an unpacked
wheel of Triton: the entries are those that Triton of this wheel looks for. This Triton then has to be of the same
version, and TRITON_PTXAS_PATH has to name the same ptxas on both machines. `--pack FILE.tar.xz` writes what the other
machine needs of the cache, and `--unpack FILE.tar.xz` adds it to the cache there. If it fits, nothing is compiled then.
"""

import argparse
import ast
import functools
import hashlib
import itertools
import json
import os
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import _async_compile, autotuner, cache, driver, jit

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.bench import fla_model, kernels, peers
from lrnn.bench.step import random_batches
from lrnn.cli import COMPILE_ONCE
from lrnn.kernels.common import dispatch
from lrnn.kernels.delta_rule.api import saving_states
from lrnn.model.layers import Mixer
from lrnn.pretrain.config import Config, load_config, load_model_of
from lrnn.pretrain.data.chains import Chains
from lrnn.pretrain.data.micro_batch import MicroBatch, model_inputs
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.fused.layers import fuse, refresh
from lrnn.pretrain.stages import model_in, stages_of
from lrnn.pretrain.state_passing import CarriedStates
from lrnn.pretrain.step import compute

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm)


class StandIn:
    """Triton's driver of a machine without a GPU, as far as compilation asks for it.

    Triton remembers the target of each GPU, and its kernels. So each object is another GPU, with a number of none.
    """

    numbers = itertools.count(-1, -1)

    def __init__(self) -> None:
        self.number = next(self.numbers)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


class WithoutProducts(TorchDispatchMode):
    """Return new memory in place of products of matrices, which take minutes on a CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **kwargs)
        if "out" in kwargs:
            return kwargs["out"]
        if func.overloadpacket in (aten.addmm_, aten.addmm, aten.baddbmm):
            x, *args = args  # type: ignore[assignment]
            if func.overloadpacket is aten.addmm_:
                return x
        a, b = args[:2]
        return a.new_empty(*a.shape[:-1], b.shape[-1])


class Compilation:
    """Kernels that are being compiled.

    Attributes:
        executor: the threads.
        mode: Triton's list of what they compile.
        launched: names of the kernels that were asked for.
    """

    def __init__(self, threads: int):
        self.executor = ThreadPoolExecutor(threads)
        self.mode = _async_compile.AsyncCompileMode(self.executor)
        self.launched: set[str] = set()

    def submit(self, original: Callable, function: Any, args: tuple, kwargs: dict) -> None:
        """Do what a launch does up to the compilation, which a thread does."""
        self.launched.add(function.fn.__name__)
        # A backward pass on a GPU runs in a thread that does not inherit the mode.
        token = _async_compile.active_mode.set(self.mode)
        try:
            original(function, *args, **kwargs | {"warmup": True})
        finally:
            _async_compile.active_mode.reset(token)

    @contextmanager
    def instead_of_launches(self) -> Iterator[None]:
        """Let every launch in the `with` block ask for its kernel alone."""
        original = jit.JITFunction.run

        def tried(tuner: Any, *args: Any, **kwargs: Any) -> None:
            """Ask for each of the configurations among which fla's kernels choose the fastest."""
            tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
            for config in tuner.prune_configs(kwargs):
                tuner.fn.run(*args, **kwargs, **config.all_kwargs())

        tuners = autotuner.Autotuner, *autotuner.Autotuner.__subclasses__()  # fla has one of its own
        with ExitStack() as exits:
            run = functools.partial(self.submit, original)
            exits.enter_context(patch.object(jit.JITFunction, "run", lambda f, *args, **kwargs: run(f, args, kwargs)))
            for tuner in (tuner for tuner in tuners if "run" in vars(tuner)):
                exits.enter_context(patch.object(tuner, "run", tried))
            yield

    def wait(self) -> list[str]:
        """Wait for all kernels, and return what failed. On a GPU, also build their launchers and load them."""

        def finish(future: Future) -> str | None:
            try:
                kernel = future.result()
                if torch.cuda.is_available():
                    _ = kernel.run
            except Exception as error:
                return f"{type(error).__name__}: {str(error).strip()[-300:]}"
            return None

        wait(self.mode.raw_futures)
        return [error for error in self.executor.map(finish, self.mode.raw_futures) if error is not None]


def one_of_each(config: LrnnConfig) -> LrnnConfig:
    """Return the configuration of a model with one layer of each kind that another model has."""
    mixer = config.mixer
    layers = len(mixer) if isinstance(mixer, list) else 1
    return LrnnConfig(**config.to_dict() | {"num_hidden_layers": min(layers, config.num_hidden_layers)})


def go_through(config: Config, model_config: LrnnConfig, device: torch.device) -> None:
    """Call everything that a training step of a run calls, and its evaluation."""
    half = config.precision != "float32"
    dtype = torch.bfloat16 if half else torch.float32
    model = LrnnForCausalLM(one_of_each(model_config)).to(device).train()
    if config.fused_layers if config.fused_layers is not None else half:
        options = {"recompute_mlp": config.activation_checkpointing == "mlp", "float8": config.precision == "fp8"}
        fuse(model, dtype, partitioned=config.zero == 3, z_loss=config.optim.z_loss, **options)
    refresh(model)
    ranks = Ranks(0, 1, device, None)  # type: ignore[arg-type]
    one = config.model_copy(update={"global_batch_size": config.micro_batch_size})
    batch = random_batches(one, model_config.vocab_size, ranks)[0]
    states = _states(model, one) if config.data.state_passing else None
    recomputed = saving_states() if config.activation_checkpointing == "full" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        with recomputed:
            for carried in (False, True) if states else (False,):
                _both_passes(model, batch, states, carried)
        with torch.no_grad():
            model.eval()(**model_inputs(batch, device))


def _both_passes(model: LrnnForCausalLM, batch: MicroBatch, states: CarriedStates | None, carried: bool) -> None:
    """Compute a micro-batch whose rows begin with fresh states, or with those that were carried on."""
    batch.continues = torch.full((len(batch.input_ids),), carried) if states else None
    device = next(model.parameters()).device
    loss = compute(model, model_inputs(batch, device), 0, batch, states)  # type: ignore[arg-type]
    loss.backward()


def _states(model: LrnnForCausalLM, config: Config) -> CarriedStates:
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    rows = config.micro_batch_size
    return CarriedStates(mixers, Chains(rows, 2), config.batching(0, 1), config.data.seq_len)


def go_through_fla(config: Config, model_config: LrnnConfig, device: torch.device) -> None:
    """Call what a training step of fla's model calls."""
    if (reason := fla_model.reason_without(model_config, 1)) is not None:
        raise SystemExit(f"--fla: {reason}")
    model = fla_model.build(one_of_each(model_config), torch.float32, device)
    one = config.model_copy(update={"global_batch_size": config.micro_batch_size})
    batches = random_batches(one, model_config.vocab_size, Ranks(0, 1, device, None))  # type: ignore[arg-type]
    fla_model.training_step(model, config, batches, device)()


def go_through_kernels(
    heads: tuple[int, int, int], shape: tuple[int, int], device: torch.device, with_fla: bool
) -> None:
    """Call what `lrnn bench kernels` calls."""
    H, K, V = heads
    x = kernels.make_inputs(*shape, H, K, str(device), value_size=V)
    for run in (*kernels.OURS.values(), *((peers.fla,) if with_fla else ())):
        forward, both = kernels.passes(run, x)
        with peers.fla_guard_lifted() if with_fla else nullcontext():
            forward()
            both()


def triton_key(folder: Path) -> str:
    """Return what Triton of an unpacked wheel begins the keys of its cache with. Its code is not imported."""
    file = folder / "triton/runtime/cache.py"
    tree = ast.parse(file.read_text())
    (function,) = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "triton_key")
    function.decorator_list = []
    version = next(
        line.split("'")[1]
        for line in (folder / "triton/__init__.py").read_text().splitlines()
        if line.startswith("__version__")
    )
    if version != triton.__version__:
        raise SystemExit(f"--triton {folder}: it is Triton {version}, and this is {triton.__version__}")
    names = {"__file__": str(file), "__version__": version, "os": os, "hashlib": hashlib, "sysconfig": sysconfig}
    exec(compile(ast.Module([function], []), str(file), "exec"), names)
    return names["triton_key"]()  # type: ignore[operator]


def pack(folder: Path, file: Path) -> None:
    """Write the binaries of a cache, and what Triton knows of them, to a tar file."""
    with tarfile.open(file, "w:xz") as tar:
        for path in sorted(folder.glob("*/*")):
            if path.suffix in (".cubin", ".json"):
                tar.add(path, path.relative_to(folder))


def unpack(file: Path, folder: Path) -> None:
    """Add what `pack` wrote to a cache. An entry names its files with their whole paths."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file) as tar:
        tar.extractall(folder, filter="data")
        groups = [folder / name for name in tar.getnames() if Path(name).name.startswith("__grp__")]
    for group in groups:
        files = [group.parent / name for name in json.loads(group.read_text())["child_paths"]]
        group.write_text(json.dumps({"child_paths": {file.name: str(file) for file in files if file.exists()}}))


def entries(folder: Path) -> set[str]:
    """Return the kernels of a cache, each in a folder."""
    return {path.parent.name for path in folder.glob("*/*.cubin")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="'CONFIG key=value ...'", help="runs")
    parser.add_argument("--heads", nargs="+", default=[], metavar="HxKxV", help="heads of `lrnn bench kernels`")
    parser.add_argument("--shapes", nargs="+", default=["8x4096"], metavar="BxT", help="shapes of `lrnn bench kernels`")
    parser.add_argument("--fla", action="store_true", help="also those of fla, on a GPU")
    parser.add_argument("--triton", type=Path, metavar="FOLDER", help="make entries for Triton of this unpacked wheel")
    parser.add_argument("--pack", type=Path, metavar="FILE.tar.xz", help="write the cache to this file")
    parser.add_argument("--unpack", type=Path, metavar="FILE.tar.xz", help="first add this file to the cache")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="kernels at a time (default one per core)")
    args = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_MANAGER", COMPILE_ONCE)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(triton.knobs.cache.dir)
    if args.unpack is not None:
        unpack(args.unpack, folder)
    before, start = entries(folder), time.perf_counter()
    compilation = Compilation(args.threads)
    if args.fla and (reason := fla_model.reason_without(LrnnConfig(), 1)) is not None:  # imports fla's own tuner
        raise SystemExit(f"--fla: {reason}")
    with ExitStack() as exits:
        key = cache.triton_key() if args.triton is None else triton_key(args.triton)
        exits.enter_context(patch.object(cache, "triton_key", functools.cache(lambda: key)))
        if device.type == "cpu":
            without_gpu(exits)
        exits.enter_context(compilation.instead_of_launches())
        for text in args.runs:
            config, *overrides = text.split()
            for stage in stages_of(load_config(config, overrides)):
                model_config = model_in(stage, load_model_of(stage.config))
                go_through(stage.config, model_config, device)
                if args.fla:
                    go_through_fla(stage.config, model_config, device)
        for heads in args.heads:
            for shape in args.shapes:
                H, K, V = (int(x) for x in heads.split("x"))
                go_through_kernels((H, K, V), kernels.parse_shape(shape), device, args.fla)
        walked = time.perf_counter() - start
        errors = compilation.wait()
    for error in sorted(set(errors)):
        print(f"failed: {error}")
    made = len(entries(folder) - before)
    print(f"Triton {triton.__version__}, key {hashlib.sha256(key.encode()).hexdigest()[:16]}, cache {folder}")
    print(f"{len(compilation.mode.raw_futures)} kernels asked for in {walked:.0f} s, {made} compiled, "
          f"{len(errors)} failed; {time.perf_counter() - start:.0f} s")  # fmt: skip
    if args.pack is not None:
        pack(folder, args.pack)
        print(f"{args.pack}: {args.pack.stat().st_size / 2**20:.1f} MiB")
    if errors and not args.fla:  # Configurations of fla that do not compile are left out by fla, too.
        sys.exit(1)


def without_gpu(exits: ExitStack) -> None:
    """Let computations on the CPU launch kernels, for an H200, and leave out products."""
    exits.enter_context(patch.object(driver, "_active", StandIn()))
    exits.enter_context(patch.object(dispatch, "INTERPRETED", True))
    exits.enter_context(patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
    exits.enter_context(WithoutProducts())


if __name__ == "__main__":
    main()
