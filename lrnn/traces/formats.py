"""All formats by name."""

from lrnn.traces.automaton import Automaton
from lrnn.traces.permutations import Permutations
from lrnn.traces.program import Format
from lrnn.traces.recall import Recall
from lrnn.traces.repl import Session
from lrnn.traces.stack import Depth, Top
from lrnn.traces.variables import Variables

FORMATS: dict[str, Format] = {
    "trace_bits": Variables(2),
    "trace_integers": Variables(5),
    "trace_s3": Permutations(3),
    "trace_s5": Permutations(5),
    "trace_automaton": Automaton(),
    "trace_stack_depth": Depth(),
    "trace_stack_top": Top(),
    "trace_repl_1": Session(1),
    "trace_repl_4": Session(4),
    "trace_repl_16": Session(16),
    "trace_repl_never": Session(0),
    "trace_recall": Recall(),
}
