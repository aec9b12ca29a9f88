"""A ladder of six cells of 1M parameters that train for six steps, and the corpus that they read."""

import json
import sysconfig
from pathlib import Path

import yaml

from lrnn.cli import main

SOURCE = Path(sysconfig.get_paths()["stdlib"])
MODEL = {"hidden_size": 128, "num_hidden_layers": 4, "num_heads": 2, "head_dim": 64, "vocab_size": 400}
STEPS = 6
HELDOUT = ("keyword.py", "sched.py")
NAMES = [
    f"1m/{arm}/{range_}/1536/seed-{seed}"
    for seed in (0, 1)
    for arm, range_ in (("delta", "negative"), ("delta", "positive"), ("attention", "none"))
]


def write_ladder(folder: Path) -> Path:
    """Write a corpus, held-out documents, and the file of a ladder that reads them. Return the file."""
    command = ["corpus", str(SOURCE), "--include", "json/*.py", "--processes", "1", "--train-tokenizer", "400"]
    assert main([*command, "--out", str(folder / "code")]) == 0
    with (folder / "heldout.jsonl").open("w") as file:
        for name in HELDOUT:
            file.write(json.dumps({"text": (SOURCE / name).read_text()[:400]}) + "\n")
    content = {
        "out": "out",
        "question": "Does the command work?",
        "run": {
            "precision": "float32",
            "data": {"seq_len": 64, "corpora": [{"path": "code"}]},
            "schedule": {"name": "wsd", "min_lr_ratio": 0.0},
            "log": {"every": 1, "tensorboard": False},
            "checkpoint": {"every": 6, "keep_last": 1, "background": False},
        },
        "sizes": {
            "1m": {
                "model": MODEL | {"intermediate_size": 384},
                "tokens": [STEPS * 256],
                "lr": 3e-3,
                "run": {"global_batch_size": 4, "micro_batch_size": 4},
                "at_once": 2,
            }
        },
        "arms": {
            "delta": {"title": "gated DeltaNet", "model": {"mixer": "gated_deltanet"}},
            "attention": {"model": {"mixer": "attention", "intermediate_size": 448}},
        },
        "grids": [{"sizes": ["1m"], "arms": ["delta", "attention"], "seeds": [0, 1]}],
        "measure": {"heldout": [{"name": "code", "documents": "heldout.jsonl"}], "tokens": 1000, "eigenvalue_steps": 2},
    }
    (folder / "ladder.yaml").write_text(yaml.safe_dump(content))
    return folder / "ladder.yaml"
