"""Load an exported folder with transformers alone, on a CPU, and write down its logits and token ids.

The exporter runs it as `python -I reload_child.py FOLDER INPUT.safetensors OUTPUT.safetensors TEXTS.json`.
It trusts only the model's code, which the exporter has just copied from lrnn. The tokenizer has no code.
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, input_file: str, output_file: str, texts_file: str) -> None:
    """Write `native` and `float32` logits [B, T, vocab] of `input_ids` [B, T]; replace the texts by their ids."""
    given = load_file(input_file)
    torch.set_num_threads(int(given["threads"]))  # a sum that is split differently is rounded differently
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    logits = {}
    with torch.no_grad():
        logits["native"] = model(given["input_ids"]).logits.float()
        if model.dtype != torch.float32:  # loaded again, because a class may round what the file has in float32
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
        logits["float32"] = model(given["input_ids"]).logits
    save_file(logits, output_file)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with open(texts_file) as f:
        texts = json.load(f)
    with open(texts_file, "w") as f:
        json.dump([tokenizer(text).input_ids for text in texts], f)


if __name__ == "__main__":
    # Imports of lrnn fail even if it is installed, and of kernels that classes would call, although they need a GPU.
    sys.modules.update(dict.fromkeys(("lrnn", "causal_conv1d", "fla", "mamba_ssm")))  # type: ignore[arg-type]
    main(*sys.argv[1:])
