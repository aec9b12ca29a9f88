"""Scaled accuracies that the papers report, best of 3 seeds [median where given], to stand beside what was measured.

arXiv 2411.12537v5, Tables 3 and 4 (formal languages, trained on sizes 3 to 40, tested on 40 to 256).
"""

from lrnn.eval.state_tracking.grid import NO_RANGE

REPORTED: dict[tuple[str, str, str], str] = {
    ("parity", "transformer", NO_RANGE): ".022",
    ("parity", "mlstm", "positive"): ".087",
    ("parity", "slstm", NO_RANGE): "1.000",
    ("parity", "mamba", "positive"): ".000",
    ("parity", "mamba", "negative"): "1.000",
    ("parity", "deltanet", "positive"): ".017",
    ("parity", "deltanet", "negative"): "1.000 [.999]",
    ("modular_arithmetic", "transformer", NO_RANGE): ".031",
    ("modular_arithmetic", "mlstm", "positive"): ".040",
    ("modular_arithmetic", "slstm", NO_RANGE): ".787 [.124]",
    ("modular_arithmetic", "mamba", "positive"): ".095",
    ("modular_arithmetic", "mamba", "negative"): ".241 [.214]",
    ("modular_arithmetic", "deltanet", "positive"): ".314 [.214]",
    ("modular_arithmetic", "deltanet", "negative"): ".971 [.826]",
}


def reported(task: str, mixer: str, range_: str) -> str:
    """The figure of the paper for a task (by its kind), an architecture and a range; "-" where it has none."""
    return REPORTED.get((task, mixer, range_), "-")
