"""The report of the text tasks."""

from lrnn.eval.length_report import LengthReport
from lrnn.eval.state_tracking.tasks import TEXT_TASKS

REPORT = LengthReport("state_tracking", TEXT_TASKS, scores={"mc": "scaled_acc", "gen": "scaled_exact_match"})
