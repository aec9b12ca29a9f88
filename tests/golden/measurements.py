"""The parts of the golden record. Each is a function of a work folder, which holds the results of earlier parts.

Each part runs in its own process (see record.py) and returns values that JSON can hold.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import surfaces
import yaml
from transformers import AutoTokenizer
from without_lrnn import logits_of

HERE = Path(__file__).parent
OLD_CHECKPOINT = HERE / "old_checkpoint"
TOKENIZER = OLD_CHECKPOINT / "run/checkpoints/step-00000008/tokenizer/tokenizer.model"
STEPS = 20
WORDS = [
    "def",
    "return",
    "self",
    "for",
    "in",
    "if",
    "else",
    "import",
    "value",
    "index",
    "0",
    "1",
    "42",
    "==",
    "+=",
    "#",
]
WORDS += ["é", "日本", "</s>", "{}", ":", "\n", "\n    ", "\t"]
SPLITS = ("train", "heldout")
MANIFEST_KEYS = ("format", "format_version", "tokenizer", "dtype", "document_prefix", "document_suffix", "skipped")
# Losses on processors that round differently must stay close for 20 steps. Normalising a vector near zero, or updating
# by the sign of a gradient near zero, would drive them apart, so the norms and Adam have large epsilons.
MODEL = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "state_size": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.1,
    "norm_eps": 1e-2,
}  # fmt: skip
MAIN = "gated_deltanet"
RANGES = {"negative": True, "positive": False, "none": True}  # the value of `allow_neg_eigval`
RUNS = [
    (mixer, r) for mixer, has in surfaces.HAS_RANGE.items() for r in (("negative", "positive") if has else ["none"])
]
Record = dict[str, Any]


# --- corpora ----------------------------------------------------------------------------------------------------------


def write_text(folder: Path, seed: int, files: int) -> None:
    """Write files of 2 to 30 words; Python guarantees that `random()` keeps its numbers in all versions."""
    folder.mkdir()
    rng = random.Random(seed)
    for i in range(files):
        words = [WORDS[int(rng.random() * len(WORDS))] for _ in range(2 + int(29 * rng.random()))]
        (folder / f"{folder.name}_{i:02d}.txt").write_bytes(f"x{' '.join(words)}".encode())


def corpora(work: Path) -> Record:
    """Make two corpora, and a tokenizer trained on the first. The second is small: a run needs several epochs of it."""
    record: Record = {}
    for name, seed, files in (("a", 1, 100), ("b", 2, 24)):
        text, folder = work / f"text_{name}", work / "corpora" / name
        write_text(text, seed, files)
        options = ["--out", folder, "--heldout", "0.2", "--processes", "1"]
        surfaces.command("corpus", text, *options, "--tokenizer", TOKENIZER)
        manifest = json.loads((folder / "manifest.json").read_text())
        record[name] = {
            "files": _files(folder),
            "manifest": {key: manifest[key] for key in MANIFEST_KEYS} | {"keys": sorted(manifest)},
            "heldout.jsonl": _sha256((folder / "heldout.jsonl").read_bytes()),
        }
        for split in SPLITS:
            tokens, starts, fingerprint = surfaces.read_corpus(folder, split)
            record[name][split] = {
                "tokens": _digest(tokens),
                "dtype": str(tokens.dtype),
                "first tokens": tokens[:16].tolist(),
                "document starts": _digest(starts),
                "fingerprint": fingerprint,
                "manifest": manifest["splits"][split],
            }
    options = ["--out", work / "trained", "--processes", "1"]
    surfaces.command("corpus", work / "text_a", *options, "--train-tokenizer", "300")
    record["trained tokenizer"] = _sha256((work / "trained/tokenizer/tokenizer.model").read_bytes())
    return record


def order(work: Path) -> Record:
    """Return the order of windows in an epoch, and the order of samples of one corpus and of a mix of two."""
    record: Record = {}
    samples = np.concatenate([np.arange(start, start + 300) for start in (0, 4000, 10**9)])
    for seed in (0, 1, 12345):
        for epoch in (0, 1, 7):
            for n in (1, 37, 1000):
                windows = surfaces.permutation(seed, epoch, n)
                name = f"seed {seed}, epoch {epoch}, {n} windows"
                record[name] = {"first": windows[:6].tolist(), "all": _digest(windows)}
        for weights in ([1.0], [1.0, 2.0]):
            found = surfaces.mixed_order([300, 37][: len(weights)], weights, seed, samples)
            record[f"seed {seed}, weights {weights}"] = {
                name: {"first": values[:6].tolist(), "all": _digest(values)}
                for name, values in zip(("corpus", "epoch", "window"), found, strict=True)
            }
    return record


# --- training ---------------------------------------------------------------------------------------------------------


def training(work: Path) -> Record:
    """Return the losses of every mixer with every range. The runs leave checkpoints for the export."""
    record = {}
    for mixer, eigenvalue_range in RUNS:
        name = f"{mixer} {eigenvalue_range}"
        print(name, flush=True)
        model = MODEL | {"mixer": mixer, "allow_neg_eigval": RANGES[eigenvalue_range]}
        # 80 tokens are more than a chunk of the delta rule.
        shape = {"seq_len": 80, "micro_batch_size": 2} if mixer == MAIN else {"seq_len": 20, "micro_batch_size": 4}
        # Each mixer that has two runs resets its state in one and carries it over in the other.
        resets = mixer == MAIN or eigenvalue_range != "positive"
        surfaces.command("pretrain", _write_run(work, name, name, model, resets=resets, **shape))
        record[name] = _metrics(work / "runs" / name) | {
            "checkpoint": _checkpoint(work, name, name == f"{MAIN} negative")
        }
    return record


def zero(work: Path) -> Record | None:
    """Return the losses of a run on two processes under each ZeRO stage; None in the second process."""
    record = {}
    rank = int(os.environ["RANK"])
    for stage in (1, 2, 3):
        name = f"stage {stage}"
        print(name, flush=True)
        shape = {"seq_len": 48, "micro_batch_size": 1}  # two micro-batches per step
        config = _write_run(
            work,
            name,
            f"{name} rank {rank}",
            MODEL | {"mixer": MAIN, "num_hidden_layers": 1},
            resets=True,
            zero_stage=stage,
            **shape,
        )
        surfaces.command("pretrain", config, "schedule={name: wsd, warmup_steps: 2, decay_steps: 5}")
        if rank == 0:
            record[name] = _metrics(work / "runs" / name) | {"checkpoint": _checkpoint(work, name, values=False)}
    return record if rank == 0 else None


def old_checkpoint(work: Path) -> Record:
    """Record a run that was never stopped, and the same run resumed from a checkpoint of an earlier version."""
    shutil.copytree(OLD_CHECKPOINT, work / "old_checkpoint")
    os.chdir(work)  # its configuration contains relative paths
    config = "old_checkpoint/run.yaml"
    surfaces.command("pretrain", config, "run_dir=runs/never_stopped")
    surfaces.command("pretrain", config)
    resumed = work / "old_checkpoint/run"
    return {
        "never stopped": _metrics(work / "runs/never_stopped"),
        "resumed": _metrics(resumed),
        "start": [_events(resumed, "start")[0][key] for key in ("step", "resumed")],
    }


def _write_run(
    work: Path,
    name: str,
    folder: str,
    model: Record,
    *,
    seq_len: int,
    micro_batch_size: int,
    resets: bool,
    zero_stage: int = 2,
) -> Path:
    """Write the configuration of a run into its own folder. Return the YAML file."""
    run = {
        "run_dir": str(work / "runs" / name),
        "steps": STEPS,
        "global_batch_size": 4,
        "micro_batch_size": micro_batch_size,
        "data": {
            "seq_len": seq_len,
            "reset_at_document_boundaries": resets,
            "corpora": [
                {"path": str(work / "corpora/a"), "weight": 1.0},
                {"path": str(work / "corpora/b"), "weight": 2.0},
            ],
        },
        "optim": {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 3},
        "log": {"every": 1, "heldout_every": 10, "heldout_batches": 2, "tensorboard": False},
        "seed": 7,
    }
    return surfaces.write_run(work / "configs" / folder, model, run, zero_stage)


def _records(run: Path) -> list[Record]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _events(run: Path, kind: str) -> list[Record]:
    return [record for record in _records(run) if record.get("event") == kind]


def _metrics(run: Path) -> Record:
    """Return losses, gradient norms and learning rates of all steps, and the eigenvalues and counts of the last one."""
    steps = [record for record in _records(run) if "event" not in record]
    last = steps[-1]
    series = {key: [record[key] for record in steps] for key in ("step", "loss", "grad_norm", "lr")}
    heldout = {str(record["step"]): record["heldout_loss"] for record in steps if "heldout_loss" in record}
    counts = {key: last[key] for key in ("tokens", "samples", "skipped_steps", "eigenvalues")}
    return series | counts | {"heldout_loss": heldout, "keys": sorted(last)}


def _checkpoint(work: Path, name: str, values: bool) -> Record:
    """Return files, tensors and progress of the newest checkpoint of a run; with `values`, also the tensors' values."""
    root = work / "runs" / name / "checkpoints"
    folder = root / (root / "latest").read_text().strip()
    shapes, held = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                tensor = tensors.get_tensor(key)
                shapes[f"{file.name} {key}"] = f"{tensor.dtype} {list(tensor.shape)}"
                held[key] = [tensor[0].item(), tensor.double().abs().sum().item()]
    config = json.loads((folder / "config.json").read_text())
    record: Record = {
        "files": _files(folder),
        "tensors": _sha256(json.dumps(shapes).encode()),
        "number of tensors": len(shapes),
        "config.json": sorted(config),
        "progress.json": json.loads((folder / "progress.json").read_text()),
    }
    return record | ({"shapes": shapes, "first element and sum of sizes": held} if values else {})


# --- export -----------------------------------------------------------------------------------------------------------


def export(work: Path) -> Record:
    """Export every run. Return the contents of the folders, and logits with lrnn and in a process without it."""
    record: Record = {}
    exports = work / "exports"
    with surfaces.without_checks():
        for mixer, eigenvalue_range in RUNS:
            name = f"{mixer} {eigenvalue_range}"
            print(name, flush=True)
            run = work / "runs" / name
            surfaces.command("export", run, exports / name, *surfaces.EXPORT_LRNN, "--license", "apache-2.0")
            record[name] = _folder(exports / name) | {"logits": logits_of(str(exports / name), trust_remote_code=False)}
            if mixer in surfaces.FLA_MIXERS:
                fla, back = exports / f"{name} fla", exports / f"{name} back from fla"
                surfaces.command("export", run, fla, *surfaces.EXPORT_FLA)
                record[fla.name] = _folder(fla)
                surfaces.command("export", fla, back, *surfaces.IMPORT_FLA)
                record[back.name] = _folder(back) | {"logits": logits_of(str(back), trust_remote_code=False)}
        surfaces.command("export", work / "runs" / f"{MAIN} negative", exports / "bfloat16", "--dtype", "bfloat16")
        record["bfloat16"] = _folder(exports / "bfloat16")
    # One range is enough: the code is the same.
    names = [f"{mixer} {eigenvalue_range}" for mixer, eigenvalue_range in RUNS if eigenvalue_range != "positive"]
    for name, logits in zip(names, _logits_without_lrnn(work, [str(exports / name) for name in names]), strict=True):
        record[name]["logits without lrnn"] = logits
    tokenizer = AutoTokenizer.from_pretrained(exports / names[0])
    record["tokenizer"] = {text: tokenizer(text).input_ids for text in ("def f(x):\n    return 42", "é 日本</s>")}
    return record


def _folder(folder: Path) -> Record:
    """Return the names of the files, `config.json`, and names, shapes and types of the parameters."""
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as tensors:
        slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
        shapes = {key: [part.get_dtype(), part.get_shape()] for key, part in slices.items()}
    config = json.loads((folder / "config.json").read_text())
    del config["transformers_version"]
    config["lrnn_training"].pop("run_config_sha256", None)  # the configuration contains paths of the work folder
    parameters = json.dumps(shapes, sort_keys=True)
    files = [name for name in _files(folder) if not name.endswith(".py")]  # a new mixer may bring a file of code
    return {"files": files, "config.json": config, "parameters": [len(shapes), _sha256(parameters.encode())]}


def _logits_without_lrnn(work: Path, folders: list[str]) -> list[Record]:
    (work / "folders.json").write_text(json.dumps(folders))
    command = [sys.executable, "-I", HERE / "without_lrnn.py", work / "folders.json", work / "without_lrnn.json"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules")}
    subprocess.run(command, cwd=work, env=environment, check=True)
    found = json.loads((work / "without_lrnn.json").read_text())
    return [found[folder] for folder in folders]


# --- state tracking ---------------------------------------------------------------------------------------------------

VARIANTS: dict[str, list[Record]] = {
    "parity": [{}],
    "even_pairs": [{}],
    "cycle_navigation": [{}, {"cycle_length": 7}],
    "modular_arithmetic": [{}, {"modulus": 3, "running_values": True}],
    "modular_arithmetic_brackets": [{}, {"modulus": 7, "operators": "+-", "running_values": True}],
    "group_word": [
        {},
        {"group": "S3", "inputs": [[1, 0, 2], [1, 2, 0]], "others": 0.25},
        {"group": "A5", "variant": "three_permutations"},
        {"group": "S5", "variant": "only_swaps", "others": 0.1},
        {"group": "S4", "variant": "four_tokens"},
        {"group": "Z60"},
    ],
}


def track_samples(work: Path) -> Record:
    """Return samples of every state-tracking task, for two seeds and two splits."""
    record: Record = {}
    for task in surfaces.TRACK_TASKS:
        for parameters in VARIANTS[task]:
            for seed, split in ((0, "train"), (3, "test")):
                found = surfaces.track_samples(task, parameters, seed, split, 64, (8, 40))
                name = f"{task} {json.dumps(parameters)}, seed {seed}, {split}"
                record[name] = {key: _digest(tensor.numpy()) for key, tensor in found.items()}
                record[name]["first"] = found["input_ids"][0, : found["lengths"][0]].tolist()
    return record


def track_grid(work: Path) -> Record:
    """Run a small grid of `lrnn track`, with a curriculum and with states that are passed on."""
    (work / "grid.yaml").write_text(yaml.safe_dump(GRID | {"out": str(work / "track")}))
    surfaces.command("track", work / "grid.yaml", "--device", "cpu")
    record: Record = {"files": _files(work / "track")}
    for file in sorted((work / "track").rglob("result.json")):
        result = json.loads(file.read_text())
        steps = _records(file.parent)
        record[str(file.parent.relative_to(work / "track"))] = {
            "loss": [step["loss_last"] for step in steps],
            "grad_norm": [step["grad_norm"] for step in steps],
            "lr": [step["lr"] for step in steps],
            "eigenvalues": steps[-1]["eigenvalues"],
            "result": {key: result[key] for key in ("accuracy", "floor", "by_length", "parameters", "fingerprint")},
            "keys": sorted(result),
        }
    return record


GRID: Record = {
    "tasks": {"parity": {"task": "parity"}, "s3": {"task": "group_word", "group": "S3"}},
    "models": {
        "product": {
            "mixer": "deltaproduct", "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1, "head_dim": 16,
            "conv_size": 1, "intermediate_size": 32, "initializer_range": 0.1, "norm_eps": 1e-2,
        }
    },
    "seeds": [0],
    "train": {
        "min_length": 4, "max_length": 12, "steps": 15, "batch_size": 8, "lr": 1e-3, "state_passing": 0.9,
        "log_every": 5, "curriculum": [{"steps": 5, "max_length": 6}],
    },
    "test": {"min_length": 12, "max_length": 24, "samples": 64, "batch_size": 32},
}  # fmt: skip


def text_documents(work: Path) -> Record:
    """Return documents of every task of the evaluation suite `state_tracking`."""
    record: Record = {}
    for task in surfaces.TEXT_TASK_NAMES:
        found = surfaces.text_documents(task)
        text = json.dumps(found, sort_keys=True)
        record[task] = {"documents": len(found), "first": found[0], "all": _sha256(text.encode())}
    return record


# --- digests ----------------------------------------------------------------------------------------------------------


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(values: np.ndarray) -> str:
    """Return the digest of integers, whatever their type."""
    return _sha256(np.ascontiguousarray(values, dtype="<i8").tobytes())


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# The parts in the order in which they run. `zero` needs two processes.
PARTS: dict[str, Callable[[Path], Record | None]] = {
    "corpora": corpora,
    "order": order,
    "training": training,
    "zero": zero,
    "old checkpoint": old_checkpoint,
    "export": export,
    "track samples": track_samples,
    "track grid": track_grid,
    "text documents": text_documents,
}
