"""Write text with solved state-tracking questions, as the suite `state_tracking` of `lrnn eval` asks them.

    python tests/benchmarks/tracking_text.py OUT.jsonl [DOCUMENTS]

Every document holds six solved questions of one task, of 1 to 32 units each. They come from the split `train`; the
suite's own questions come from `test`.
"""

import json
import sys

import torch

from lrnn.eval.state_tracking.tasks import TEXT_TASKS
from lrnn.track.tasks.counter_rng import split_seed

TASKS = ("parity", "even_pairs", "cycle_navigation", "s3_swaps", "s5_swaps")
QUESTIONS, LONGEST = 6, 32


def main(path: str, documents: int = 60_000) -> None:
    count = documents // len(TASKS) * QUESTIONS
    r = torch.Generator().manual_seed(0)
    texts: list[str] = []
    for name in TASKS:
        task = TEXT_TASKS[name]
        lengths = torch.randint(1, LONGEST + 1, (count,), generator=r)
        solved = [""] * count
        for length in range(1, LONGEST + 1):
            places = (lengths == length).nonzero()[:, 0]
            ids, answers = task.draw(split_seed(1, "train"), places + length * 2**24, length)
            for place, row, answer in zip(places.tolist(), ids.tolist(), answers.tolist(), strict=True):
                solved[place] = f"{task.question(row)} {task.choices[answer]}"
        texts += ["\n\n".join(solved[i : i + QUESTIONS]) for i in range(0, count, QUESTIONS)]
    with open(path, "w") as file:
        for i in torch.randperm(len(texts), generator=r).tolist():
            file.write(json.dumps({"text": texts[i]}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
