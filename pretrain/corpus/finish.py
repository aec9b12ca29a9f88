"""Turn written shards into a corpus: their final names, the files of `datasets.load_from_disk`, and the manifest."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lrnn
from lrnn.files import write_json
from lrnn.pretrain.corpus import shard_table
from lrnn.pretrain.corpus.reader import FORMAT, FORMAT_VERSION
from lrnn.pretrain.corpus.shard_writer import token_dtype
from lrnn.tokenizer import Tokenizer


def finish_split(work: Path, split: str, dtype: str, entries: list[dict]) -> dict:
    """Give the shards their final names, and add the files that `datasets.load_from_disk` needs.

    Returns:
        The split's entry in the manifest.
    """
    shards = []
    for index, entry in enumerate(entries):
        name = f"{split}/data-{index:05d}-of-{len(entries):05d}.arrow"
        for suffix in ("", shard_table.SUFFIX):
            written = work / split / f"part-{index:05d}.arrow{suffix}"
            if written.exists():  # False if an earlier run was cut off below.
                os.replace(written, work / f"{name}{suffix}")
        shards.append({"file": name, **{k: v for k, v in entry["splits"][split].items() if k != "bytes"}})
    features = {"tokens": {"feature": {"dtype": dtype, "_type": "Value"}, "_type": "List"}}
    write_json(work / split / "dataset_info.json", {"features": features})
    state = {
        "_data_files": [{"filename": Path(shard["file"]).name} for shard in shards],
        "_fingerprint": shards[0]["sha256"][:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    write_json(work / split / "state.json", state)
    return {
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": sum(entry["splits"][split]["bytes"] for entry in entries),
        "shards": shards,
    }


def describe(tokenizer: Tokenizer, splits: dict[str, dict], skipped: dict[str, int], arguments: dict[str, Any]) -> dict:
    """Return the manifest of a corpus.

    Args:
        splits: the entry of each split; see `finish_split`.
        skipped: how many documents or files were left out, by reason.
        arguments: what decides the content.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.description(),
        "dtype": token_dtype(tokenizer.vocab_size),
        "document_prefix": tokenizer.document_prefix,
        "document_suffix": tokenizer.document_suffix,
        "splits": splits,
        "skipped": skipped,
        "arguments": arguments,
        "versions": {
            "lrnn": lrnn.__version__,
            **{name: version(name) for name in ("datasets", "pyarrow", "sentencepiece", "transformers")},
        },
    }
