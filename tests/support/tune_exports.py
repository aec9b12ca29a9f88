"""Fine-tune an exported folder without lrnn, as `use_exports.py` uses it: `python -P tune_exports.py FOLDER WORK`.

Trains a step with transformers' Trainer, and merges an adapter of PEFT. Prints whether the saved models load and give
the logits of the models that were saved.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

sys.modules["lrnn"] = None  # type: ignore[assignment]  # makes `import lrnn` fail
IDS = torch.arange(1, 33).view(2, 16)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


@torch.no_grad()
def is_saved(model: torch.nn.Module, folder: Path) -> bool:
    return torch.equal(load(folder)(IDS).logits, model.eval()(IDS).logits)


def train(folder: Path, out: Path) -> dict:
    model = load(folder)
    before = model.lm_head.weight.detach().clone()
    options = {"report_to": [], "use_cpu": True, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=model, args=TrainingArguments(out, max_steps=1, **options), train_dataset=rows).train()
    return {"trained": not torch.equal(before, model.lm_head.weight), "Trainer": is_saved(model, out / "checkpoint-1")}


def adapt(folder: Path, out: Path) -> dict:
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(load(folder), lora)
    adapted.save_pretrained(out / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(out / "merged")
    different = not torch.equal(merged(IDS).logits, load(folder)(IDS).logits)
    return {"adapted": different, "PEFT": is_saved(merged, out / "merged")}


def main(folder: str, work: str) -> None:
    torch.set_num_threads(1)
    out = Path(work)
    print("RESULT", json.dumps(train(Path(folder), out / "trainer") | adapt(Path(folder), out)))


if __name__ == "__main__":
    main(*sys.argv[1:])
