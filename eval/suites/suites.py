"""The evaluation suites: a name, what it is for, and its lm-eval tasks (files in `tasks/`)."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from lrnn.errors import UserError
from lrnn.eval.state_tracking.text_report import TASK_NAMES

TASK_FOLDER = Path(__file__).resolve().parent / "tasks"
HELDOUT_TASK = "lrnn_heldout_bpb"
CODE_TASKS = frozenset({"lrnn_humaneval", "lrnn_mbpp"})  # they run what the model wrote
STATE_TRACKING = (*TASK_NAMES["mc"], *TASK_NAMES["gen"])  # their prompts are never to be cut
GENERATION_TOKENS = {"lrnn_humaneval": 1024, "lrnn_mbpp": 256, "lrnn_gsm8k_cot": 256, "lrnn_minerva_math": 256}
GENERATION_TOKENS |= dict.fromkeys(TASK_NAMES["gen"], 8)


@dataclass(frozen=True)
class Suite:
    """`tasks` are names of lm-eval tasks; a held-out file adds one more."""

    name: str
    purpose: str
    tasks: tuple[str, ...]


GOLD = ("lrnn_humaneval_bpb", "lrnn_mbpp_bpb", "lrnn_gsm8k_bpb", "lrnn_math500_bpb")
SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "quick",
            "a first look, minutes on a CPU: gold-answer bits per byte of HumanEval and GSM8K without examples",
            ("lrnn_humaneval_bpb_0shot", "lrnn_gsm8k_bpb_0shot"),
        ),
        Suite(
            "fast",
            "every checkpoint: gold-answer bits per byte of HumanEval, MBPP, GSM8K and MATH-500 with OLMo's prompts",
            GOLD,
        ),
        Suite(
            "code_math",
            "the final model: fast, pass@1 of HumanEval and MBPP, exact match of GSM8K and MATH",
            (*GOLD, "lrnn_humaneval", "lrnn_mbpp", "lrnn_gsm8k_cot", "lrnn_minerva_math"),
        ),
        Suite(
            "state_tracking",
            "state-tracking questions in words and in Python, 4 to 256 steps long, chosen and generated answers",
            STATE_TRACKING,
        ),
    )
}


def find_suite(name: str) -> Suite:
    """The suite of that name; an unknown one is a UserError that names the nearest and lists all."""
    if name in SUITES:
        return SUITES[name]
    nearest = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"unknown suite {name!r}.{hint} The suites are: {', '.join(SUITES)}")
