"""Check a folder that is exported for flash-linear-attention (`fla`): fla itself loads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lrnn.eval.export.check import check_loading_info


def check_fla_folder(folder: Path, model: torch.nn.Module) -> None:
    """Load a folder with fla, and compare names, shapes and values with `model`. (fla's forward pass needs a GPU.)

    Raises:
        RuntimeError: a parameter is missing or unknown, or has another shape or value.
    """
    import fla  # noqa: F401  registers its models
    from transformers import AutoModelForCausalLM

    with _attention_without_flash_attn():
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    check_loading_info(info, "fla")
    theirs = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        if not torch.equal(theirs.pop(name), parameter.float()):
            raise RuntimeError(f"the export is wrong: fla reads other values of {name}")
    if theirs:
        raise RuntimeError(f"the export is wrong: fla has a parameter {min(theirs)} that the trained model lacks")


@contextmanager
def _attention_without_flash_attn() -> Iterator[None]:
    """Let fla build attention where flash-attn, which only its forward pass calls, is not installed."""
    from fla.layers import attn

    installed = attn.flash_attn_func
    attn.flash_attn_func = installed or _attention_without_flash_attn
    try:
        yield
    finally:
        attn.flash_attn_func = installed
