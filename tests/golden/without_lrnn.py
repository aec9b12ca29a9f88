"""Logits of exported folders, in the form in which the golden record keeps them.

Run as `python -I without_lrnn.py FOLDERS.json OUT.json`, it is a process that cannot import lrnn. FOLDERS is a list of
folders. OUT becomes an object with the result of `logits_of` for each folder.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM

ROWS, TOKENS, DECODED, PADDED = 2, 80, 5, 9  # 80 tokens are more than a chunk of the delta rule


@torch.no_grad()
def logits_of(folder: str, trust_remote_code: bool) -> dict[str, Any]:
    """Return some logits of fixed tokens: from one pass over them, from decoding one by one, and with padding ahead."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust_remote_code, dtype=torch.float32, local_files_only=True
    ).eval()
    vocab = model.config.vocab_size
    i = torch.arange(ROWS * TOKENS)
    ids = ((7 * i * i + 3 * i) % vocab).view(ROWS, TOKENS)
    whole = model(input_ids=ids).logits
    out = model(input_ids=ids[:, :-DECODED], use_cache=True)
    for t in range(TOKENS - DECODED, TOKENS):
        out = model(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
    mask = torch.ones_like(ids)
    mask[0, :PADDED] = 0
    padded = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    return {
        "class": type(model).__name__,
        "shape": list(whole.shape),
        "whole": whole[:, :: TOKENS // 2 - 1, :: vocab // 3].flatten().tolist(),
        "mean of squares": whole.double().square().mean().item(),
        "one by one": out.logits[:, -1, :: vocab // 3].flatten().tolist(),
        "padded": padded[:, :: vocab // 3].flatten().tolist(),
    }


def main(folders_file: str, out_file: str) -> None:
    torch.set_num_threads(1)
    with open(folders_file) as file:
        folders = json.load(file)
    found = {folder: logits_of(folder, trust_remote_code=True) for folder in folders}
    with open(out_file, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    sys.modules["lrnn"] = None  # type: ignore[assignment]  # makes `import lrnn` fail even if it is installed
    main(*sys.argv[1:])
