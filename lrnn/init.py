"""Lay out a project in DIR: a run, its model and batch scripts, copied from a configuration that comes with lrnn.

run.yaml     the run; its paths are relative to the file
model.json   the model
slurm/       batch scripts for corpora, training and evaluation
README.md    the commands of the whole job

Nothing that exists is overwritten.
"""

import argparse
import re
import shlex
from pathlib import Path

from lrnn import shipped
from lrnn.errors import UserError
from lrnn.files import write_atomically

CORPUS = "corpus"
README = """# {title}

`run.yaml` describes a pretraining run of `lrnn` and `model.json` its model; `slurm/` holds batch scripts. Relative
paths in `run.yaml` start at its folder. The whole job, in this folder:

```bash
lrnn corpus SOURCE --tokenizer TOKENIZER --heldout 0.01 --out {corpus}  # files, folders or a data set of the hub
lrnn pretrain run.yaml              # on this machine; the same command resumes the run
lrnn submit run.yaml --nodes 1      # or on SLURM; --template slurm/train.sbatch uses the script in this folder
lrnn plot {run}
lrnn export {run} {run}/hf
lrnn eval --fetch                   # benchmark data, once
lrnn eval {run}/hf --suite quick --heldout {corpus}/heldout.jsonl
```

The model has {vocab_size:,} token ids: name a tokenizer with at most that many, or let `lrnn corpus` train one with
`--train-tokenizer {vocab_size}` instead of `--tokenizer TOKENIZER`, or change `vocab_size` in `model.json`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [name for name in shipped.names(shipped.RUNS) if _model_of(name).is_file()]
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the project, made if it does not exist")
    parser.add_argument("--config", choices=names, default="tiny", help="configuration to begin with (default: tiny)")
    parser.epilog = "example:\n  lrnn init my-model --config 340m"


def main(args: argparse.Namespace) -> int:
    files = project_files(args.config, args.folder.resolve().name)
    existing = [name for name in files if (args.folder / name).exists()]
    if existing:
        raise UserError(f"{args.folder / existing[0]} exists and is not overwritten; give another folder")
    try:
        for name, text in files.items():
            (args.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.folder / name, text)
    except OSError as error:
        raise UserError(f"{args.folder} cannot be written ({error.strerror}: {error.filename})") from None
    print(f"wrote {', '.join(files)} to {args.folder}")
    print(f"next: cd {shlex.quote(str(args.folder))}, and the commands in README.md")
    return 0


def project_files(config: str, title: str) -> dict[str, str]:
    """Return the files of a project, text by relative path.

    Args:
        config: name of a run that comes with lrnn.
        title: name of the project.
    """
    from lrnn.settings import read_json

    run, model = f"runs/{config}", _model_of(config)
    values = {"run_dir": run, "model": "model.json", "    - path": CORPUS}
    text = (shipped.RUNS / f"{config}.yaml").read_text(encoding="utf-8")
    for key, value in values.items():
        text, found = re.subn(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
        assert found == 1, f"{config}.yaml has {found} lines {key}"
    about = f"# A pretraining run, begun as lrnn's configuration {config}. Relative paths start at the file's folder.\n"
    text = about + re.sub(r"\A(#.*\n)+", "", text)  # the comment is about the configuration's own data
    vocab_size = read_json(model, "model configuration")["vocab_size"]
    files = {"run.yaml": text, "model.json": model.read_text(encoding="utf-8")}
    files |= {f"slurm/{script.name}": script.read_text() for script in sorted(shipped.BATCH_SCRIPTS.glob("*.sbatch"))}
    return files | {"README.md": README.format(title=title, corpus=CORPUS, run=run, vocab_size=vocab_size)}


def _model_of(config: str) -> Path:
    """Return the file of a configuration's model. One that varies another run has none of its own."""
    return shipped.MODELS / f"{config}.json"
