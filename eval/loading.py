"""Load a model folder for an evaluation. The folder is untrusted: none of its code is run, and nothing is unpickled."""

from pathlib import Path
from typing import Any

import torch

from lrnn.errors import UserError, first_line
from lrnn.eval.generation.decoding import is_of_lrnn
from lrnn.eval.model_class import import_class
from lrnn.eval.model_folder import check_export, default_device


def choose_device(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Return torch's objects for the names; None as for `default_device`.

    Raises:
        UserError: the dtype is unknown, or the device cannot be used.
    """
    device, dtype = default_device(device, dtype)
    as_type = getattr(torch, dtype, None)
    if not isinstance(as_type, torch.dtype) or not as_type.is_floating_point:
        raise UserError(f"--dtype {dtype} is not a floating-point dtype; give float32, bfloat16 or float16")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA raises AssertionError
        raise UserError(f"--device {device} cannot be used: {first_line(error)}") from error
    return torch.device(device), as_type


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the model of a folder in eval mode, on a device.

    Raises:
        UserError: the weights cannot be read, or one of them is missing, of another shape than config.json asks for,
            infinite or NaN, or left over in a model of lrnn.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    import_class(check_export(folder)["model_type"], device.type)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            device_map={"": str(device)},
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}") from error
    # transformers fills weights of both kinds with random numbers and continues.
    if info["missing_keys"]:
        raise UserError(f"{folder} holds no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    # Folders of others may hold weights for training or for other heads; an export holds none.
    if info["unexpected_keys"] and is_of_lrnn(model):
        left_over = ", ".join(sorted(info["unexpected_keys"])[:3])
        raise UserError(f"{folder} holds weights that the model of config.json lacks: {left_over}")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise UserError(f"{folder}: {name} has shape {list(found)}; config.json asks for {list(wanted)}")
    for name, weight in model.named_parameters():
        if weight.dtype.itemsize > 1 and not weight.isfinite().all():  # formats of one byte have no such function
            raise UserError(f"{folder}: {name} has values that are infinite or NaN")
    return model.eval()
