"""The evaluation suites: name, purpose and lm-eval tasks (the files in `tasks/`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrnn.errors import UserError
from lrnn.eval.retrieval.needles import FORMS
from lrnn.eval.retrieval.windows import PROMPTS
from lrnn.eval.state_tracking.report import REPORT as STATE_TRACKING_REPORT
from lrnn.eval.traces.report import REPORT as TRACES_REPORT
from lrnn.settings import name_hint

TASK_FOLDER = Path(__file__).resolve().parent / "tasks"
HELDOUT_TASK = "lrnn_heldout_bpb"
CODE_TASKS = frozenset({"lrnn_humaneval", "lrnn_mbpp"})  # they run code written by the model
STATE_TRACKING, TRACES = (
    (*report.task_names["mc"], *report.task_names["gen"]) for report in (STATE_TRACKING_REPORT, TRACES_REPORT)
)
WHOLE_PROMPTS = frozenset({*STATE_TRACKING, *TRACES})  # the right answer to a truncated prompt would be another
RECALL = ("lrnn_recall_pairs", *(f"lrnn_recall_{name}" for name in PROMPTS))
NEEDLES = tuple(f"lrnn_needle_{form}" for form in FORMS)


@dataclass(frozen=True)
class Suite:
    """A list of lm-eval tasks; a held-out file adds one more.

    Attributes:
        optional: those of the tasks that are left out, with a line that says so, if their data is missing.
    """

    name: str
    purpose: str
    tasks: tuple[str, ...]
    optional: tuple[str, ...] = ()


CHOICES = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "social_iqa", "boolq", "openbookqa", "sciq")
COMMONSENSE = ("wikitext", "lambada_openai", *CHOICES)
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
            "the final model: fast, pass@1 of HumanEval and MBPP, exact match of GSM8K and MATH, choices of MathQA",
            (*GOLD, "lrnn_humaneval", "lrnn_mbpp", "lrnn_gsm8k_cot", "lrnn_minerva_math", "lrnn_mathqa"),
            optional=("lrnn_mathqa",),  # the only one whose data is not on PyPI
        ),
        Suite(
            "commonsense",
            "the field's tables: perplexity of wikitext and LAMBADA, ten tasks of common sense, averages of 6, 8 and 9",
            tuple(f"lrnn_{name}" for name in COMMONSENSE),
        ),
        Suite(
            "recall",
            "what a text said: SWDE, FDA, SQuAD, TriviaQA, NQ, DROP in JRT's prompts; lists of 4 to 256 keys",
            RECALL,
        ),
        Suite(
            "needle",
            "one sentence found again in texts of 1,024 to 32,768 tokens, as far as the context reaches; RULER's forms",
            NEEDLES,
        ),
        Suite(
            "state_tracking",
            "state-tracking questions in words and in Python, 4 to 256 steps long, chosen and generated answers",
            STATE_TRACKING,
        ),
        Suite(
            "traces",
            "Python programs to execute, 4 to 512 state changes long, chosen and generated answers",
            TRACES,
        ),
    )
}


def find_suite(name: str) -> Suite:
    """Return the suite of that name. Raise UserError for an unknown one, naming the nearest and all."""
    if name in SUITES:
        return SUITES[name]
    raise UserError(f"unknown suite {name!r}; {name_hint(name, list(SUITES), list_all=True)}")


class RunsCode(UserError):
    """Tasks run code written by the model, which the user has neither allowed nor skipped.

    Attributes:
        tasks: their names.
    """

    def __init__(self, message: str, tasks: Sequence[str]):
        super().__init__(message)
        self.tasks = list(tasks)


def choose_tasks(suite: str, heldout: bool, allow_code: bool, skip_code: bool) -> tuple[list[str], list[str]]:
    """Return the tasks to run and those left out.

    Raises:
        RunsCode: the suite runs code, and the user has neither allowed nor skipped that.
    """
    tasks = [*([HELDOUT_TASK] if heldout else []), *find_suite(suite).tasks]
    code = [task for task in tasks if task in CODE_TASKS]
    if not code or allow_code:
        return tasks, []
    if not skip_code:
        raise RunsCode(
            f"suite {suite!r} runs code written by the model ({', '.join(code)}): add --allow-code-execution to run it "
            "in a sandbox, or --skip-code-execution to leave these tasks out",
            code,
        )
    return [task for task in tasks if task not in code], code
