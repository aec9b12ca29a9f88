"""Write what came out as a table in Markdown: packages, text and tokens."""

from typing import Any

from lrnn.ladder.text.chunks import HELDOUT, TRACES
from lrnn.ladder.text.table import DOMAINS

HEADER = (
    "| package | version | licence | download MB | documents | text MB | million tokens | bytes/token | "
    "held out: documents | million tokens |\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|\n"
)


def table(manifest: dict[str, Any], counts: dict[str, Any]) -> str:
    """Return the table of a text: a row for each package in a domain, and sums.

    Args:
        manifest: that of the text; see `make_text`.
        counts: tokens of the chunks that were made; see `chunks.counts_of`. If some were not made, the tokens of the
            train documents are those of all text at the bytes per token of these and of the held-out text.
    """
    out = HEADER
    sums = []
    for domain in DOMAINS:
        rows = [
            _row(name, package, domain, counts)
            for name, package in manifest["packages"].items()
            if domain in package["text"]
        ]
        if rows:
            rows.append(
                [f"**{domain}**", "", "", *(sum(column) for column in zip(*(row[3:] for row in rows), strict=True))]
            )
            out += "".join(_line(row) for row in rows)
            sums.append(rows[-1])
    out += _line(["**all text**", "", "", *(sum(column) for column in zip(*(row[3:] for row in sums), strict=True))])
    train, heldout = (counts[split].get(TRACES, {}).get(TRACES, {}) for split in ("train", HELDOUT))
    if train:
        both = [train["documents"], train["bytes"], train["tokens"], heldout["documents"], heldout["tokens"]]
        out += _line([TRACES, "", "", 0, *both])
    return out


def _row(name: str, package: dict[str, Any], domain: str, counts: dict[str, Any]) -> list:
    """Return name, version, licence, bytes to download, documents, bytes, tokens; and held-out documents and tokens."""
    text = package["text"][domain].get("train", {"documents": 0, "bytes": 0})
    made, held = (counts[split].get(domain, {}).get(name, {}) for split in ("train", HELDOUT))
    if made.get("bytes") == text["bytes"]:
        tokens = made["tokens"]
    else:
        size, some = (made.get(key, 0) + held.get(key, 0) for key in ("bytes", "tokens"))
        tokens = text["bytes"] * some / size if size else 0
    download = package["download_bytes"] if domain == next(iter(package["text"])) else 0
    return [
        name,
        package["version"],
        package["licence"],
        download,
        text["documents"],
        text["bytes"],
        tokens,
        held.get("documents", 0),
        held.get("tokens", 0),
    ]


def _line(row: list) -> str:
    name, version, licence, download, documents, size, tokens, held, held_tokens = row
    each = f"{size / tokens:.2f}" if tokens else ""
    return (
        f"| {name} | {version} | {licence} | {download / 1e6:.1f} | {documents:,} | {size / 1e6:.1f} | "
        f"{tokens / 1e6:.2f} | {each} | {held:,} | {held_tokens / 1e6:.2f} |\n"
    )
