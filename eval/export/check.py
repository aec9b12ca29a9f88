"""Read an exported folder back, and check that it is complete and computes what the trained model computes."""

import json
import os
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrnn import LrnnForCausalLM
from lrnn.tokenizer import Tokenizer
from lrnn.tokenizer_export import real_texts

TOLERANCE = 1e-4  # largest difference between logits computed twice in float32 with the same weights
CLASS_TOLERANCE = 1e-3  # the same for a class that computes in another way, relative to the largest logit
BATCH, SEQ_LEN = 2, 150  # more than two chunks of the recurrence, the last one partial


def sample_batch(tokenizer: Tokenizer) -> Tensor:
    """Return documents of real text: int64 [2, 150], with fewer columns if there is less text."""
    ids = list(chain.from_iterable(tokenizer.encode_batch(real_texts())))
    prefix = tokenizer.document_prefix
    length = min(SEQ_LEN, len(ids) // BATCH + len(prefix)) - len(prefix)
    starts = [i * len(ids) // BATCH for i in range(BATCH)]
    return torch.tensor([prefix + ids[start : start + length] for start in starts])


@torch.no_grad()
def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return logits float32 [B, T, vocab], computed in the model's own dtype."""
    return model(input_ids).logits.float()


def check_hf_folder(
    folder: Path, model: LrnnForCausalLM, tokenizer: Tokenizer, trained: Tensor, batch: Tensor
) -> float:
    """Load a folder with lrnn, and in a process without lrnn, and compare it with the model.

    Args:
        folder: the exported folder.
        model: the model as written, with rounded weights; it is cast to float32 here.
        tokenizer: the tokenizer that the model was trained with.
        trained: logits of the trained float32 model, [B, T, vocab].
        batch: the token ids of those logits, [B, T].

    Returns:
        The largest difference between the logits of the folder, in its own dtype, and `trained`.

    Raises:
        RuntimeError: a weight is missing or unknown, the tokenizer gives other ids, or the logits in float32 are not
            those of the written weights.
    """
    truth = logits(model.float(), batch)
    print("reloading with lrnn", flush=True)
    got = _load_with_lrnn(folder, batch)
    _check_logits(got["float32"], truth, "with lrnn")
    return max(_largest(got["native"] - trained), _check_without_lrnn(folder, tokenizer, truth, trained, batch))


def check_class_folder(
    folder: Path, model: LrnnForCausalLM, tokenizer: Tokenizer, trained: Tensor, batch: Tensor
) -> float:
    """Load a folder whose model is a class of transformers in a process without lrnn, and compare it with the model.

    Arguments, result and errors are those of `check_hf_folder`. The class may compute more differently than by the
    order of sums: `olmo_hybrid` norms queries and keys x as x / sqrt(|x|^2 + 1e-6), not as x / max(|x|, 1e-6).
    """
    truth = logits(model.float(), batch)
    return _check_without_lrnn(folder, tokenizer, truth, trained, batch, CLASS_TOLERANCE * max(1.0, _largest(truth)))


def _check_without_lrnn(
    folder: Path,
    tokenizer: Tokenizer,
    truth: Tensor,
    trained: Tensor,
    batch: Tensor,
    tolerance: float = TOLERANCE,
) -> float:
    """Return the largest difference from `trained`. Raise RuntimeError if token ids, or logits in float32, differ."""
    print("reloading in a process without lrnn", flush=True)
    texts = real_texts()
    got, ids = _load_without_lrnn(folder, batch, texts)
    if ids != tokenizer.encode_batch(texts):
        raise RuntimeError("the export is wrong: loaded without lrnn, its tokenizer gives other ids")
    _check_logits(got["float32"], truth, "without lrnn", tolerance)
    return _largest(got["native"] - trained)


def check_loading_info(info: dict[str, Any], who: str) -> None:
    """Raise RuntimeError if `from_pretrained(..., output_loading_info=True)` reports a bad weight.

    That is one that is missing, unexpected or of another shape. transformers itself fills it with random numbers and
    continues.
    """
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info[problem]:
            found = sorted(str(x) for x in info[problem])
            raise RuntimeError(f"the export is wrong: {who} finds {problem.replace('_', ' ')}: {', '.join(found[:3])}")


def _load_with_lrnn(folder: Path, batch: Tensor) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    check_loading_info(info, "transformers")
    if type(model) is not LrnnForCausalLM:
        raise RuntimeError(f"the export is wrong: transformers loads it as {type(model).__qualname__}")
    return {"native": logits(model.eval(), batch), "float32": logits(model.float(), batch)}


def _load_without_lrnn(folder: Path, batch: Tensor, texts: list[str]) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Return logits as `_load_with_lrnn` does, and the ids of the texts, from reload_child.py."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_file({"input_ids": batch, "threads": torch.tensor(torch.get_num_threads())}, work / "in.safetensors")
        (work / "texts.json").write_text(json.dumps(texts))
        arguments = [folder.absolute(), work / "in.safetensors", work / "out.safetensors", work / "texts.json"]
        done = subprocess.run(
            [sys.executable, "-I", Path(__file__).with_name("reload_child.py"), *arguments],
            cwd=work,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise RuntimeError(f"the export is wrong: it does not load without lrnn:\n{last}")
        return load_file(work / "out.safetensors"), json.loads((work / "texts.json").read_text())


def _check_logits(got: Tensor, truth: Tensor, who: str, tolerance: float = TOLERANCE) -> None:
    error = _largest(got - truth)
    if not error < tolerance:  # true for NaN too
        raise RuntimeError(f"the export is wrong: loaded {who}, its logits differ by {error:.3g} in float32")


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
