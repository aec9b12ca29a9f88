"""Scaled accuracies that the papers report, best of 3 seeds [median where given], to stand beside what was measured.

arXiv 2411.12537v5, section 5.1 (formal languages, trained on sizes 3 to 40, tested on 40 to 256). The brackets with
products are those of its Table 3, those without are what its released generator makes.
"""

from typing import Any

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
    ("modular_arithmetic_brackets +-*", "transformer", NO_RANGE): ".067",
    ("modular_arithmetic_brackets +-*", "mlstm", "positive"): ".114",
    ("modular_arithmetic_brackets +-*", "slstm", NO_RANGE): ".178",
    ("modular_arithmetic_brackets +-*", "mamba", "positive"): ".123",
    ("modular_arithmetic_brackets +-*", "mamba", "negative"): ".116",
    ("modular_arithmetic_brackets +-*", "deltanet", "positive"): ".194",
    ("modular_arithmetic_brackets +-*", "deltanet", "negative"): ".260 [.227]",
    ("modular_arithmetic_brackets +-", "transformer", NO_RANGE): ".025",
    ("modular_arithmetic_brackets +-", "mlstm", "positive"): ".034",
    ("modular_arithmetic_brackets +-", "slstm", NO_RANGE): ".173",
    ("modular_arithmetic_brackets +-", "mamba", "positive"): ".092",
    ("modular_arithmetic_brackets +-", "mamba", "negative"): ".136",
    ("modular_arithmetic_brackets +-", "deltanet", "positive"): ".137",
    ("modular_arithmetic_brackets +-", "deltanet", "negative"): ".200 [.129]",
}


def reported(parameters: dict[str, Any], mixer: str, range_: str) -> str:
    """The figure of the paper for a task of a grid, an architecture and a range; "-" where it has none."""
    task = parameters["task"]
    if task == "modular_arithmetic_brackets":
        task += f" {parameters.get('operators', '+-*')}"
    return REPORTED.get((task, mixer, range_), "-") if parameters.get("modulus", 5) == 5 else "-"
