"""Use exported folders as a user does, without lrnn: `python -P use_exports.py INPUT.json OUTPUT.safetensors WORK`.

INPUT has the folders, token ids, texts and prompts. OUTPUT gets the logits of each folder as it is, and of the model
saved again. Everything else is printed, one JSON object per folder. Written for transformers 4.57 and later.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

sys.modules["lrnn"] = None  # type: ignore[assignment]  # makes `import lrnn` fail

FREE = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


@torch.no_grad()
def use(folder: Path, given: dict, work: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    found = {
        "transformers": transformers.__version__,
        "class": type(model).__module__.split(".")[0],
        "ids": [tokenizer(text, add_special_tokens=False).input_ids for text in given["texts"]],
        "decoded": [tokenizer.decode(ids) for ids in given["decoded"]],
        "dtypes": {name: str(p.dtype) for name, p in model.named_parameters()},
        "tied": model.lm_head.weight is model.model.embeddings.weight,
        "base": type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__,
    }
    batch = torch.tensor(given["batch"])
    model.save_pretrained(work / "saved")
    tokenizer.save_pretrained(work / "saved")
    saved = AutoModelForCausalLM.from_pretrained(work / "saved", trust_remote_code=True, dtype="auto").eval()
    found["saved files"] = {p.name: p.read_text() for p in (work / "saved").glob("*.py")}
    logits = {"exported": model.float()(batch).logits, "saved": saved.float()(batch).logits}
    generated = []
    for prompt in given["prompts"]:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, **FREE)
        assert torch.equal(ids, model.generate(**inputs, **FREE, use_cache=False)), (
            "the cache changes what is generated"
        )
        generated.append(ids[0, inputs.input_ids.shape[1] :].tolist())
    inputs = tokenizer(given["prompts"], return_tensors="pt", padding=True)
    found["generated"] = generated
    found["generated in a batch"] = model.generate(**inputs, **FREE)[:, inputs.input_ids.shape[1] :].tolist()
    found["beams"] = list(model.generate(**inputs, **FREE, num_beams=2, num_return_sequences=2).shape)
    run = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu", dtype=torch.float32)
    continued = [run(prompt, **FREE, return_tensors=True)[0]["generated_token_ids"] for prompt in given["prompts"]]
    found["pipeline"] = [list(ids)[-len(generated[0]) :] for ids in continued]
    return found, logits


def main(input_file: str, output_file: str, work: str) -> None:
    torch.set_num_threads(1)
    given = json.loads(Path(input_file).read_text())
    tensors = {}
    for name, folder in given["folders"].items():
        found, logits = use(Path(folder), given, Path(work) / name)
        tensors |= {f"{name} {kind}": x.float() for kind, x in logits.items()}
        print("RESULT", json.dumps(found))
    save_file(tensors, output_file)
    for folder in given["tokenizers"]:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        print("TOKENIZER", json.dumps([tokenizer(text, add_special_tokens=False).input_ids for text in given["texts"]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
