"""Make the text of the ladder from packages. Run `python -m lrnn.ladder.text --help`."""

import argparse
import math
import os
import sys
import time
from pathlib import Path

from lrnn.errors import UserError
from lrnn.eval.suites.fetch_data import data_dir
from lrnn.files import write_atomically
from lrnn.ladder.text.chunks import counts_of, make_chunks
from lrnn.ladder.text.make import make_text
from lrnn.ladder.text.pack import pack
from lrnn.ladder.text.report import table as markdown
from lrnn.ladder.text.table import SHIPPED, read_table


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m lrnn.ladder.text", description="Make the text of the ladder.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where everything is written; needs 15 GB")
    parser.add_argument("--table", type=Path, default=SHIPPED, help="the packages (default: packages.yaml of lrnn)")
    parser.add_argument("--only", action="append", metavar="PACKAGE", help="take this package alone; may be repeated")
    parser.add_argument(
        "--newest", action="store_true", help="take newer versions of packages where the registry has no other"
    )
    parser.add_argument(
        "--benchmarks", type=Path, metavar="DIR", help="data that `lrnn eval --fetch` wrote (default: where it does)"
    )
    parser.add_argument("--text-alone", action="store_true", help="stop before the tokenizer, the tokens and the parts")
    parser.add_argument(
        "--tokens", type=float, default=math.inf, metavar="MILLIONS", help="tokenise about so many (default: all)"
    )
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    return parser


def main() -> int:
    """Run the command."""
    args = _parser().parse_args()
    start = time.monotonic()
    try:
        table = read_table(args.table)
        if args.only:
            if unknown := set(args.only) - table.packages.keys():
                raise UserError(f"--only {min(unknown)}: {args.table} has no such package")
            table = table.model_copy(update={"packages": {name: table.packages[name] for name in args.only}})
        manifest = make_text(table, args.folder, args.benchmarks or data_dir(), args.newest, args.processes, _say)
        if not args.text_alone:
            make_chunks(args.folder, args.tokens * 1e6, args.processes, _say)
            pack(args.folder, _say)
            write_atomically(args.folder / "text.md", markdown(manifest, counts_of(args.folder / "chunks")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _say(f"took {time.monotonic() - start:,.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
