"""Tokenise text or code into a corpus: Arrow shards of token ids, their checksums, and a manifest.

SOURCE is a file or folder of text, JSON, CSV, Parquet or Arrow, compressed or not, a saved data set, or anything that
`datasets.load_dataset` takes. A document is a row, a text file or a line of one. With --traces, documents are generated
programs to execute. The corpus appears under its name only when it is complete. The same command continues a build that
was cut off.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.files import write_json
from lrnn.pretrain.corpus.dataset import DatasetSource
from lrnn.pretrain.corpus.file_source import FileSource
from lrnn.pretrain.corpus.finish import describe, finish_split
from lrnn.pretrain.corpus.locate import locate
from lrnn.pretrain.corpus.progress import Progress
from lrnn.pretrain.corpus.reader import FORMAT_VERSION
from lrnn.pretrain.corpus.shard_writer import token_dtype, watch_parent, write_part
from lrnn.pretrain.corpus.source import Source, SourceArguments
from lrnn.pretrain.corpus.streams import DatasetStream, FileStream, StreamingSource
from lrnn.pretrain.corpus.traces import MOST_CHANGES, TracesSource, check_traces
from lrnn.tokenizer import Tokenizer, check_trained_size, load_tokenizer, train_sentencepiece
from lrnn.tokenizer_export import check_exportable

EXAMPLES = """\
examples:
  # a folder of source code, with a tokenizer trained on it
  lrnn corpus ~/src/linux --include '*.c' --include '*.h' --train-tokenizer 32000 --heldout 0.01 --out corpora/linux
  # a folder of JSON lines, with the tokenizer of another corpus
  lrnn corpus web --include '*.jsonl.zst' --tokenizer corpora/linux/tokenizer --out corpora/web
  # a text file of which every line is a document
  lrnn corpus sentences.txt --sample-by line --tokenizer corpora/linux/tokenizer --out corpora/sentences
  # a data set of the hub, read as a stream
  lrnn corpus HuggingFaceFW/fineweb-edu --config sample-10BT --streaming --tokenizer llama.model --out corpora/fineweb
  # programs as `lrnn eval --suite traces` asks about, to mix with other corpora
  lrnn corpus --traces 100000 --tokenizer corpora/linux/tokenizer --out corpora/traces
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lrnn corpus`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="a file, a folder, a saved data set, a URL, or a name or builder that datasets.load_dataset takes",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the corpus, made by this command"
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="SentencePiece .model, a tokenizer's folder (also CORPUS/tokenizer), or hub name",
    )
    tokenizer.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="VOCAB_SIZE",
        help="train a SentencePiece BPE model on the train documents",
    )
    parser.add_argument(
        "--tokenizer-sample-mb",
        type=float,
        default=10.0,
        metavar="MB",
        help="text to train it on (default 10)",
    )
    parser.add_argument(
        "--heldout", type=float, default=0.0, metavar="FRACTION", help="hold out documents, chosen by hash (default 0)"
    )
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: one per core"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the corpus DIR")
    parser.add_argument(
        "--kind",
        choices=["text", "json", "csv", "parquet", "arrow"],
        help="read files as this (default: look at their names and first bytes)",
    )
    parser.add_argument(
        "--sample-by",
        choices=["document", "line"],
        help="make every text file a document, or every line, with its newline (default: document; "
        "line with the builder `text`)",
    )
    parser.add_argument("--text-column", default="text", metavar="COLUMN", help="column with the text (default: text)")
    parser.add_argument(
        "--skip-bad-files",
        action="store_true",
        help="leave out and count files, or the rest of files, that are empty, unreadable, cut off or not UTF-8",
    )
    parser.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="leave out and count rows that are broken, not UTF-8, or have no text in the text column",
    )
    folder = parser.add_argument_group("folders")
    folder.add_argument(
        "--include", action="append", metavar="GLOB", help="files to take (default: all); may be repeated"
    )
    folder.add_argument("--exclude", action="append", metavar="GLOB", help="files to leave out; may be repeated")
    dataset = parser.add_argument_group("data sets")
    dataset.add_argument("--data-files", action="append", metavar="GLOB", help="as in load_dataset; may be repeated")
    dataset.add_argument("--config", metavar="NAME", help="the configuration of the data set")
    dataset.add_argument("--split", default="train", help="default: train")
    dataset.add_argument("--streaming", action="store_true", help="read it as a stream, without storing a copy")
    traces = parser.add_argument_group("programs to execute")
    traces.add_argument(
        "--traces",
        type=int,
        metavar="N",
        help="instead of reading SOURCE, generate N documents in the formats of `lrnn eval --suite traces`, with other "
        "programs than it asks about",
    )
    traces.add_argument(
        "--traces-max-changes",
        type=int,
        metavar="N",
        help=f"state changes of the longest program (default {MOST_CHANGES}); the suite has up to 512",
    )


def _open_source(args: argparse.Namespace, map_files: Callable[..., Iterable]) -> Source:
    if args.traces is not None:
        print(f"generating {args.traces:,} documents of programs", flush=True)
        return TracesSource(args.traces, args.traces_max_changes or MOST_CHANGES)
    arguments = SourceArguments(
        path=args.source,
        name=args.config,
        data_files=args.data_files,
        split=args.split,
        text_column=args.text_column,
        kind=args.kind,
        sample_by=args.sample_by,
        include=args.include,
        exclude=args.exclude,
        skip_bad_files=args.skip_bad_files,
        skip_bad_rows=args.skip_bad_rows,
    )
    path = Path(args.source).expanduser()
    if path.is_dir() and args.out.resolve().is_relative_to(path.resolve()):
        raise UserError(f"--out {args.out} is inside the source folder {path}; choose a folder outside")
    located = locate(arguments)
    print(f"reading {located.what if located else f'data set {args.source!r} with datasets'}", flush=True)
    if args.streaming:
        return StreamingSource(FileStream(located, arguments) if located else DatasetStream(arguments))
    return FileSource(located, arguments, map_files) if located else DatasetSource(arguments)


def _source_name(args: argparse.Namespace) -> str:
    return repr(args.source) if args.traces is None else f"--traces {args.traces}"


def _prepare_tokenizer(args: argparse.Namespace, source: Source, work: Path) -> Tokenizer:
    """Return the tokenizer from its copy in the unfinished corpus. Make or train that copy first if it is missing."""
    folder = work / "tokenizer"
    if not folder.is_dir():
        temporary = work / "tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        if args.tokenizer is not None:
            load_tokenizer(args.tokenizer).save(temporary)
        else:
            temporary.mkdir()
            start = time.monotonic()
            texts = list(source.sample(int(args.tokenizer_sample_mb * 1e6), args.heldout))
            num_bytes = sum(len(text.encode("utf-8")) for text in texts)
            if num_bytes == 0:
                raise UserError(f"empty corpus: {_source_name(args)} has no train document to train a tokenizer on")
            print(f"training a tokenizer of {args.train_tokenizer} pieces on {num_bytes / 1e6:.1f} MB", flush=True)
            train_sentencepiece(texts, args.train_tokenizer, temporary / "tokenizer.model")
            print(f"trained in {time.monotonic() - start:.1f} s", flush=True)
        os.replace(temporary, folder)
    return load_tokenizer(folder)


def _arguments_record(args: argparse.Namespace) -> dict:
    """Return the arguments that decide the content of the corpus, as the manifest records them."""
    keys = (
        "source kind sample_by include exclude skip_bad_files skip_bad_rows data_files config split text_column "
        "streaming tokenizer train_tokenizer tokenizer_sample_mb heldout"
    )
    record = {key: getattr(args, key) for key in keys.split()}
    if args.traces is not None:
        record |= {"traces": args.traces, "traces_max_changes": args.traces_max_changes or MOST_CHANGES}
    return record


def _check_arguments(args: argparse.Namespace) -> None:
    check_traces(args)
    if not 0.0 <= args.heldout < 1.0:
        raise UserError(f"--heldout {args.heldout} should be a fraction, at least 0 and below 1")
    if args.processes < 1:
        raise UserError(f"--processes {args.processes} should be at least 1")
    if args.tokenizer_sample_mb <= 0:
        raise UserError(f"--tokenizer-sample-mb {args.tokenizer_sample_mb} should be more than 0")
    if args.tokenizer is not None:
        check_exportable(load_tokenizer(args.tokenizer))  # A bad tokenizer is found before a pass over the files.
    else:
        check_trained_size(args.train_tokenizer)
    if args.out.exists():
        if not (args.out / "manifest.json").is_file() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise UserError(f"--out {args.out} exists and is not a corpus")
        if (args.out / "manifest.json").is_file() and not args.overwrite:
            raise UserError(f"--out {args.out}: the corpus exists already; --overwrite replaces it")


def _only_leaves_out_more(before: dict, now: dict) -> bool:
    """Return whether `now` differs from `before` at most by options that leave out what ended the build before."""
    options = {"skip_bad_files", "skip_bad_rows"}
    same = all(before.get(key) == value for key, value in now.items() if key not in options)
    return same and before.keys() == now.keys() and all(now[option] >= before[option] for option in options)


def _open_work(args: argparse.Namespace, source: Source) -> Path:
    """Return the folder of the unfinished corpus: a new one, or one that the same arguments began on the same source.

    A partial corpus in another format version is not continued, because its shards lack what this version writes.
    """
    work = args.out.with_name(args.out.name + ".partial")
    begun: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "arguments": _arguments_record(args),
        "source": source.fingerprint,
    }
    if work.exists():
        try:
            found = json.loads((work / "begun.json").read_text())
        except (OSError, ValueError):
            found = None
        if found is not None and _only_leaves_out_more(found["arguments"], begun["arguments"]):
            found["arguments"] = begun["arguments"]
        if found != begun and not args.overwrite:
            raise UserError(
                f"{work} is an unfinished corpus of other arguments, of another version of this program, or of a "
                "source that has changed since; remove it, or give --overwrite"
            )
        if found != begun:
            shutil.rmtree(work)
        else:
            print(f"continuing {work}", flush=True)
            for leftover in work.glob("*/*.tmp*"):
                leftover.unlink()
    (work / "done").mkdir(parents=True, exist_ok=True)
    for split in ["train", "heldout"] if args.heldout > 0 else ["train"]:
        (work / split).mkdir(exist_ok=True)
    write_json(work / "begun.json", begun)
    return work


def _tokenise(args: argparse.Namespace, source: Source, work: Path, pool) -> list[dict]:
    """Write every part that is missing. Return the entries of all parts, in order."""
    entries: dict[int, dict] = {}
    running: dict[Future, int] = {}
    sizes = [part.num_bytes for part in source.parts()] if source.num_parts else None
    progress = Progress("tokenising", "tokenised", sum(sizes) if sizes else None)

    def collect(at_most: int) -> None:
        while len(running) > at_most:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                entries[index] = future.result()
                progress.add(entries[index]["num_bytes"])

    try:
        for index, part in enumerate(source.parts()):
            done = work / "done" / f"{index:05d}.json"
            if done.exists():
                entries[index] = json.loads(done.read_text())
                progress.add(entries[index]["num_bytes"])
            elif pool is None:
                entries[index] = write_part(part, index, work, args.heldout)
                progress.add(part.num_bytes)
            else:
                running[pool.submit(write_part, part, index, work, args.heldout)] = index
                collect(at_most=2 * args.processes)  # A part may hold its text in memory.
        collect(at_most=0)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed (out of memory?); the same command continues from here, "
            "with fewer --processes if necessary"
        ) from error
    finally:
        progress.close()
    return [entries[index] for index in range(len(entries))]


def _finish(args: argparse.Namespace, source: Source, work: Path, tokenizer: Tokenizer, entries: list[dict]) -> dict:
    """Turn the finished parts into the corpus. Return its manifest."""
    skipped = source.skipped + sum((Counter(entry["skipped"]) for entry in entries), Counter())
    if sum(entry["splits"]["train"]["tokens"] for entry in entries) == 0:
        raise UserError(
            f"empty corpus: {_source_name(args)} gives no train document"
            + (f" (left out: {dict(skipped)})" if skipped else "")
            + (f" beside those held out by --heldout {args.heldout}" if args.heldout else "")
        )
    dtype = token_dtype(tokenizer.vocab_size)
    splits = {split: finish_split(work, split, dtype, entries) for split in entries[0]["splits"]}
    if "heldout" in splits:
        with open(work / "heldout.jsonl", "wb") as joined:
            for index in range(len(entries)):
                with open(work / "done" / f"{index:05d}.jsonl", "rb") as text:
                    shutil.copyfileobj(text, joined)
    manifest = describe(tokenizer, splits, dict(skipped), _arguments_record(args))
    write_json(work / "manifest.json", manifest)
    if args.out.exists():
        shutil.rmtree(args.out)
    os.replace(work, args.out)
    # These are removed last, because the next run needs them if this one is cut off before the rename.
    shutil.rmtree(args.out / "done")
    (args.out / "begun.json").unlink()
    return manifest


def main(args: argparse.Namespace) -> int:
    """Build the corpus that `args` describe (see `add_arguments`), and print its size."""
    start = time.monotonic()
    _check_arguments(args)
    # Processes are spawned, not forked: a fork beside the threads of Arrow and of the tokenizers can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context, watch_parent) if args.processes > 1 else nullcontext() as pool:
        source = _open_source(args, lambda f, xs, n: map(f, xs) if pool is None else pool.map(f, xs, chunksize=n))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        work = _open_work(args, source)
        tokenizer = _prepare_tokenizer(args, source, work)
        entries = _tokenise(args, source, work, pool)
    if not entries:
        raise UserError(f"empty corpus: {_source_name(args)} has no documents")
    manifest = _finish(args, source, work, tokenizer, entries)
    for split, description in manifest["splits"].items():
        bytes_per_token = description["bytes"] / max(1, description["tokens"])
        print(
            f"{split}: {description['documents']:,} documents, {description['tokens']:,} tokens, "
            f"{description['bytes'] / 1e6:,.1f} MB of text, {bytes_per_token:.2f} bytes per token"
        )
    for reason, count in manifest["skipped"].items():
        unit = "files" if reason.startswith("file: ") else "documents"
        print(f"left out: {count:,} {unit}, {reason.removeprefix('file: ')}")
    print(f"wrote {args.out} in {time.monotonic() - start:.1f} s")
    return 0
