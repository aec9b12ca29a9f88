"""Time the kernels of two checkouts in one run: other, this, this, other, so that a drift of the GPU shows.

    python tests/benchmarks/compare_kernels.py OTHER_CHECKOUT [--shapes 8x4096 2x4096] [--out FOLDER]

Each turn is `lrnn bench kernels --only-ours` in a process of its own. Prints, for each shape and variant, the medians
in ms of both checkouts as CUDA graphs, and their ratio.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[2]


def turn(checkout: Path, shapes: list[str], file: Path) -> dict[tuple[str, str], list[float]]:
    """Return the medians (forward, forward + backward) in ms of each shape and variant."""
    command = [sys.executable, "-m", "lrnn.cli", "bench", "kernels", "--only-ours", "--shapes", *shapes]
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([*command, "--json", str(file)], cwd=checkout, env={**os.environ, "PYTHONPATH": path}, check=True)
    rows = json.loads(file.read_text())["kernels"]
    return {
        (f"{row['batch_size']}x{row['seq_len']}", row["contender"]): [times[0] for times in row["graph"]]
        for row in rows
        if row.get("graph")  # The floor has no such times.
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--shapes", nargs="+", default=["8x4096", "1x32768", "4x4096", "2x4096"], metavar="BxT")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_kernels"), help="folder of the JSON files")
    args = parser.parse_args()
    out, other = args.out.resolve(), args.other.resolve()
    out.mkdir(parents=True, exist_ok=True)
    order = [("other", other), ("this", ROOT), ("this", ROOT), ("other", other)]
    turns = [(name, turn(checkout, args.shapes, out / f"{i}-{name}.json")) for i, (name, checkout) in enumerate(order)]
    print("| shape | variant | other, ms | this, ms | this / other |\n|---|---|---|---|---|")
    for shape, variant in turns[0][1]:
        times = {name: [t[shape, variant] for n, t in turns if n == name] for name in ("other", "this")}
        cells = [" and ".join(" / ".join(f"{x:.3f}" for x in run) for run in times[name]) for name in ("other", "this")]
        ratios = [mean(r[i] for r in times["this"]) / mean(r[i] for r in times["other"]) for i in range(2)]
        print(f"| {shape} | {variant} | {' | '.join(cells)} | {ratios[0]:.3f} / {ratios[1]:.3f} |")


if __name__ == "__main__":
    main()
