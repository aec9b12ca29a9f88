"""Do the whole job on a laptop CPU, with the commands of a real run: corpus, pretraining, resume, export, evaluation.

The run is stopped half-way, as a pre-empted job would be. The corpus is the source of the running Python's standard
library without its tests; a part of the files is held out.
"""

import argparse
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from lrnn.errors import UserError
from lrnn.eval.suites import fetch_data
from lrnn.pretrain.launch import STOPPED
from lrnn.records import read_metrics

CONFIG = "tiny"
OUT = Path("runs/quickstart")  # the configuration reads the corpus in it
EVAL_DOCUMENTS, EVAL_CHARACTERS = 12, 4000  # held-out text that is evaluated; all of it would take minutes
FEWEST_STEPS = 20  # the run is stopped after half of them, which records of every fifth step show
PROMPT = "import os\n\ndef "
LEFT_OUT = ("site-packages/*", "*test*", "idlelib/*", "lib2to3/*")  # 11 MB of text remain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=OUT, help=f"new folder (default {OUT}, with a number if it exists)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default 100)")
    parser.add_argument("--processes", type=int, default=2, help="processes to train with (default 2)")
    parser.epilog = "example:\n  lrnn quickstart"


def main(args: argparse.Namespace) -> int:
    _check(args)
    out = _unused(args.out)
    print("$ lrnn eval --fetch", flush=True)
    fetch_data.fetch()  # Without network access this fails, so it comes before what takes minutes.
    corpus, run, export = out / "corpus", out / "run", out / "model"
    started = time.monotonic()
    build = ["corpus", sysconfig.get_paths()["stdlib"], "--include", "*.py", "--skip-bad-files", "--heldout", "0.05"]
    build += [word for glob in LEFT_OUT for word in ("--exclude", glob)]
    _lrnn(*build, "--train-tokenizer", "4096", "--tokenizer-sample-mb", "4", "--out", str(corpus))

    quarter = max(1, args.steps // 4)
    overrides = [f"run_dir={run}", f"data.corpora=[{{path: {corpus}}}]", f"steps={args.steps}", "data.seq_len=256"]
    overrides += [f"schedule.warmup_steps={args.steps // 10}", f"checkpoint.every={quarter}"]
    overrides += ["log.every=5", f"log.heldout_every={quarter}"]
    pretrain = ["pretrain", CONFIG, *overrides, "--nproc", str(args.processes)]
    _lrnn(*pretrain, stop_at=(run, args.steps // 2))
    _lrnn(*pretrain)
    _lrnn("plot", str(run), "--out", str(out / "loss.png"))
    _lrnn("export", str(run), str(export))
    heldout = _sample_of(corpus / "heldout.jsonl", out / "heldout_sample.jsonl")
    evaluate = ["eval", str(export), "--suite", "quick", "--heldout", str(heldout)]
    _lrnn(*evaluate, "--limit", str(EVAL_DOCUMENTS), "--max-length", "2048", "--out", str(out / "eval"))
    _summary(out, run, time.monotonic() - started)
    print(f"\nThe model continues {PROMPT!r}:\n\n{_continuation(export)}\n")
    print("\n".join(["Next:", *(f"  {line}" for line in _next(out))]))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for what would fail only after minutes."""
    from lrnn.pretrain.config import load_config  # here, because it imports torch

    for name, lowest in (("steps", FEWEST_STEPS), ("processes", 1)):
        if getattr(args, name) < lowest:
            raise UserError(f"--{name} {getattr(args, name)} should be at least {lowest}")
    try:
        load_config(CONFIG).batching(0, args.processes)
    except UserError as error:
        raise UserError(f"--processes {args.processes}: {error}") from None


def _sample_of(documents: Path, sample: Path) -> Path:
    """Write the first characters of the first held-out documents to `sample`, and return it."""
    with documents.open(encoding="utf-8") as rows, sample.open("w", encoding="utf-8") as out:
        for row in itertools.islice(rows, EVAL_DOCUMENTS):
            out.write(json.dumps({"text": json.loads(row)["text"][:EVAL_CHARACTERS]}) + "\n")
    return sample


def _continuation(model: Path) -> str:
    """Return what the exported model continues `PROMPT` with, as anyone would load it in transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer, lm = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = tokenizer(PROMPT).input_ids
    if ids[0] != lm.config.bos_token_id:
        ids = [lm.config.bos_token_id, *ids]
    torch.manual_seed(0)
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    made = lm.generate(given, attention_mask=mask, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.decode(made[0], skip_special_tokens=True)


def _next(out: Path) -> list[str]:
    """Return the commands to try next, each with what it does."""
    commands = {}
    environment = Path(sys.prefix)
    if sys.prefix != sys.base_prefix and os.environ.get("VIRTUAL_ENV") != sys.prefix:
        inside = environment.is_relative_to(Path.cwd())
        activate = (environment.relative_to(Path.cwd()) if inside else environment) / "bin" / "activate"
        commands[f"source {shlex.quote(str(activate))}"] = "makes lrnn a command of this shell"
    pretrain = ["lrnn", "pretrain", CONFIG]
    if out != OUT:
        pretrain += [f"run_dir={out.parent / 'tiny'}", f"data.corpora=[{{path: {out / 'corpus'}}}]"]
    commands[shlex.join(pretrain)] = "trains the same model for longer, on the same corpus"
    commands["lrnn init my-model"] = "lays out a project of your own: a run, its model, batch scripts"
    commands["lrnn --help"] = "lists all commands, and says where the documentation is"
    width = max(map(len, commands))
    return [f"{command:{width}}  # {what}" for command, what in commands.items()]


def _lrnn(*arguments: str, stop_at: tuple[Path, int] | None = None) -> None:
    """Run an lrnn command.

    Args:
        arguments: its command line.
        stop_at: (run, step); when the run reaches the step, the command gets the signal that announces a pre-emption.

    Raises:
        UserError: the command failed.
    """
    print(f"\n$ lrnn {shlex.join(arguments)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "lrnn.cli", *arguments])
    expected = 0
    if stop_at is not None:
        expected = STOPPED
        run, step = stop_at
        while process.poll() is None and _last_step(run) < step:
            time.sleep(0.2)
        if process.poll() is None:
            print(f"\n$ kill -USR1 {process.pid}  # as SLURM does before it takes the nodes away", flush=True)
            process.send_signal(signal.SIGUSR1)
    code = process.wait()
    if code != expected:
        raise UserError(f"lrnn {arguments[0]} ended with status {code}, expected {expected}; its message is above")


def _last_step(run: Path) -> int:
    if not (run / "metrics.jsonl").exists():
        return 0
    return max((r["step"] for r in read_metrics(run) if "event" not in r), default=0)


def _summary(out: Path, run: Path, seconds: float) -> None:
    records = [r for r in read_metrics(run) if "event" not in r]
    losses = [r["loss"] for r in records if "loss" in r]
    heldout = [r["heldout_loss"] for r in records if "heldout_loss" in r]
    resumed = [r["step"] for r in read_metrics(run) if r.get("event") == "start" and r["resumed"]]
    negative = records[-1]["eigenvalues"]["negative_fraction"].values()
    print(f"\nDone in {seconds / 60:.1f} minutes.\n")
    tokens = records[-1]["tokens"]
    print(f"training loss            {losses[0]:.3f} -> {losses[-1]:.3f} nats per token, {tokens:,} tokens")
    print(f"held-out loss            {heldout[0]:.3f} -> {heldout[-1]:.3f}")
    print(f"resumed at step          {', '.join(map(str, resumed))}")
    print(f"eigenvalues below zero   {', '.join(f'{100 * x:.0f}%' for x in negative)} by layer\n")
    print((out / "eval" / "table.md").read_text())
    print(json.dumps({"loss curve": str(out / "loss.png"), "model": str(out / "model"), "all": str(out)}, indent=1))


def _unused(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(p for p in candidates if not p.exists())
