"""Write small task files of lm-eval, one per output type, with documents of their own and a group."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

WORDS = ["def", "return", "yes", "no", "x", "y", "value", "print", "loop"]
CHOICE = {
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{q}}\nA:",
    "doc_to_target": "{{gold}}",
    "doc_to_choice": ["yes", "no", "perhaps it is"],
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
KINDS: dict[str, dict[str, Any]] = {
    "tiny_choice": {**CHOICE, "fewshot_split": "train", "tag": "tiny_tag"},
    "tiny_other": CHOICE,
    "tiny_last": {
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": " {{word}}",
        "tag": "tiny_tag",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "tiny_rolling": {
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "tiny_generation": {
        "test_split": "test",
        "fewshot_split": "train",
        "output_type": "generate_until",
        "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
GROUP = {
    "group": "tiny_group",
    "task": ["tiny_choice", "tiny_other"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    "metadata": {"version": 1},
}


def write_tasks(folder: Path) -> Path:
    """Write the tasks of `KINDS` and `tiny_group`, with 13 documents, 7 for `tiny_other`, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split, n in (("test", 13), ("train", 7)):
        docs = [
            {"q": " ".join(draw.choices(WORDS, k=8)), "gold": draw.randrange(3), "word": draw.choice(WORDS)}
            for _ in range(n)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name in KINDS:
        write_task(folder, name)
    write_task(folder, "tiny_other", dataset_kwargs={"data_files": {"test": str(folder / "train.jsonl")}})
    (folder / "tiny_group.yaml").write_text(yaml.safe_dump(GROUP))
    return folder


def write_task(folder: Path, name: str, like: str = "", **changes: Any) -> None:
    """Write a task file, like another with changes."""
    files = {split: str(folder / f"{split}.jsonl") for split in ("test", "train")}
    config = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, **KINDS[like or name]}
    config |= {"task": name, **changes}
    if like:
        config.pop("tag", None)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
