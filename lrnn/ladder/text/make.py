"""Make the text from a table: fetch packages, read each, put them together, and say in a manifest what came out."""

import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.files import new_folder, sha256, write_json
from lrnn.ladder.text.assemble import assemble
from lrnn.ladder.text.contamination import BENCHMARKS
from lrnn.ladder.text.download import fetch, version_of
from lrnn.ladder.text.extract import extract, is_extracted, key_of
from lrnn.ladder.text.table import Table
from lrnn.pretrain.corpus.shard_writer import watch_parent


def _benchmarks_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in BENCHMARKS:
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            raise UserError(f"{path} is missing; `lrnn eval --fetch` writes it, or name its folder with --benchmarks")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make_text(
    table: Table, folder: Path, benchmarks: Path, newest: bool, processes: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Fetch the packages of a table, read their documents, and write `FOLDER/text` with its manifest.

    What was done by an earlier call with the same table is not done again.

    Returns:
        The manifest.
    """
    against = _benchmarks_sha256(benchmarks)
    files, keys = {}, {}
    for name, package in table.packages.items():
        files[name] = fetch(name, package, folder / "downloads", newest)
        keys[name] = key_of(package, sha256(files[name]), against)
    documents = folder / "documents"
    documents.mkdir(exist_ok=True)
    left = [name for name in table.packages if not is_extracted(name, keys[name], documents)]
    left.sort(key=lambda name: -files[name].stat().st_size)  # the longest first, so that none is waited for
    say(f"packages: {len(files)}, {sum(f.stat().st_size for f in files.values()) / 1e6:,.1f} MB; {len(left)} to read")
    tasks = [(name, table.packages[name], files[name], keys[name], benchmarks, documents) for name in left]
    for name, counts in _extract_all(tasks, processes):
        say(f"{name}: {counts['documents']:,} documents; left out: {counts['left_out']}")
    key = hashlib.sha256(json.dumps([keys, table.heldout]).encode()).hexdigest()
    text = folder / "text"
    if (text / "manifest.json").is_file() and (done := json.loads((text / "manifest.json").read_text()))["key"] == key:
        say(f"{text} is complete")
        return done
    if text.exists():
        shutil.rmtree(text)
    with new_folder(text) as new:
        found = assemble(list(files), table.heldout, documents, new, say)
        manifest: dict[str, Any] = {"key": key, "heldout": table.heldout, "packages": {}, "files": {}}
        for name, package in table.packages.items():
            counts = json.loads((documents / f"{name}.json").read_text())
            manifest["packages"][name] = {
                "source": package.source,
                "version": version_of(files[name]),
                "sha256": sha256(files[name]),
                "licence": package.licence,
                "download_bytes": files[name].stat().st_size,
                "left_out": counts["left_out"] | found[name]["left_out"],
                "text": found[name]["text"],
            }
        for file in sorted(new.glob("*/*.jsonl")):
            manifest["files"][str(file.relative_to(new))] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        write_json(new / "manifest.json", manifest)
    return manifest


def _extract_all(tasks: list[tuple], processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Call `extract` with each tuple of arguments, and yield the package's name and counts when it is done."""
    if processes == 1:
        for task in tasks:
            yield task[0], extract(*task)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), watch_parent) as pool:
        running = {pool.submit(extract, *task): task[0] for task in tasks}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
