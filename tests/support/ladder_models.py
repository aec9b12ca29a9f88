"""A small random model of lrnn with a tokenizer, in the form of an export, and true log-likelihoods of it."""

import json
from pathlib import Path

import torch
from position_models import make_model
from tiny_models import write_tiny_model
from torch import Tensor

from lrnn import LrnnForCausalLM
from lrnn.traces.training import training_document


def write_export(folder: Path) -> Path:
    """Write a model with 32 tokens of training length, whose tokenizer has seen traces and prose."""
    texts = [training_document(number, 8) for number in range(20)] + ["a naïve café, and so on\n"] * 3
    return make_model(write_tiny_model(folder / "tokenizer", texts), folder / "hf")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def true_model(export: Path) -> LrnnForCausalLM:
    """Return the model in float64."""
    return LrnnForCausalLM.from_pretrained(export, dtype=torch.float64).double().eval()


@torch.no_grad()
def true_log_likelihoods(model: LrnnForCausalLM, ids: list[int]) -> Tensor:
    """Return log p of every id but the first, given all before it: float64 [n]."""
    log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
    return torch.tensor([row[i].item() for row, i in zip(log_p, ids[1:], strict=True)], dtype=torch.float64)
