"""The report of the programs."""

from lrnn.eval.length_report import LengthReport
from lrnn.traces.formats import FORMATS

NOTE = (
    " The score `area` is the area under the curve of scaled accuracy over the logarithm of the length: the mean over "
    "the lengths, each of which is twice the one before. `last value` answers with the value that was written last, "
    "`initial value` with what the answer was before the first change."
)
CONTROLS = {"last value": "last_value", "initial value": "initial_value"}
REPORT = LengthReport("traces", FORMATS, scores={"mc": "area", "gen": "area"}, note=NOTE, controls=CONTROLS)
