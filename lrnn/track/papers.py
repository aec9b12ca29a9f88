"""Scaled accuracies reported by the papers, best of 3 seeds [median if given], shown beside measured ones.

Formal languages are from arXiv 2411.12537v5, section 5.1 (trained on sizes 3 to 40, tested on 40 to 256). Brackets with
products are those of its Table 3; brackets without products are those of its released generator. The figures of gated
DeltaNet are not from that paper: they are cited at second hand and come from another protocol.

Word problems have no single figure. Section 5.2 of the same paper says where DeltaNet with one or five layers holds,
and arXiv 2502.10297 how far one layer holds for a number of Householder factors per token (S5 as read off its figure).
"""

from typing import Any

from lrnn.track.grid import NO_RANGE

OTHER_PROTOCOL = " (another protocol)"
REPORTED: dict[tuple[str, str, str], str] = {
    ("parity", "attention", NO_RANGE): ".022",
    ("parity", "mlstm", "positive"): ".087",
    ("parity", "slstm", NO_RANGE): "1.000",
    ("parity", "mamba", "positive"): ".000",
    ("parity", "mamba", "negative"): "1.000",
    ("parity", "deltanet", "positive"): ".017",
    ("parity", "deltanet", "negative"): "1.000 [.999]",
    ("parity", "gated_deltanet", "negative"): "1.000" + OTHER_PROTOCOL,
    ("modular_arithmetic", "attention", NO_RANGE): ".031",
    ("modular_arithmetic", "mlstm", "positive"): ".040",
    ("modular_arithmetic", "slstm", NO_RANGE): ".787 [.124]",
    ("modular_arithmetic", "mamba", "positive"): ".095",
    ("modular_arithmetic", "mamba", "negative"): ".241 [.214]",
    ("modular_arithmetic", "deltanet", "positive"): ".314 [.214]",
    ("modular_arithmetic", "deltanet", "negative"): ".971 [.826]",
    ("modular_arithmetic", "gated_deltanet", "negative"): ".993" + OTHER_PROTOCOL,
    ("modular_arithmetic_brackets +-*", "attention", NO_RANGE): ".067",
    ("modular_arithmetic_brackets +-*", "mlstm", "positive"): ".114",
    ("modular_arithmetic_brackets +-*", "slstm", NO_RANGE): ".178",
    ("modular_arithmetic_brackets +-*", "mamba", "positive"): ".123",
    ("modular_arithmetic_brackets +-*", "mamba", "negative"): ".116",
    ("modular_arithmetic_brackets +-*", "deltanet", "positive"): ".194",
    ("modular_arithmetic_brackets +-*", "deltanet", "negative"): ".260 [.227]",
    ("modular_arithmetic_brackets +-*", "gated_deltanet", "negative"): ".935" + OTHER_PROTOCOL,
    ("modular_arithmetic_brackets +-", "attention", NO_RANGE): ".025",
    ("modular_arithmetic_brackets +-", "mlstm", "positive"): ".034",
    ("modular_arithmetic_brackets +-", "slstm", NO_RANGE): ".173",
    ("modular_arithmetic_brackets +-", "mamba", "positive"): ".092",
    ("modular_arithmetic_brackets +-", "mamba", "negative"): ".136",
    ("modular_arithmetic_brackets +-", "deltanet", "positive"): ".137",
    ("modular_arithmetic_brackets +-", "deltanet", "negative"): ".200 [.129]",
}


# (group, variant, mixer, Householder factors per token, layers), with [-1, 1]
WORDS: dict[tuple[str, str, str, int, int], str] = {
    ("S3", "all", "deltaproduct", 1, 1): "not solved",
    ("S3", "all", "deltaproduct", 2, 1): "solved",
    ("S4", "all", "deltaproduct", 2, 1): "solved",
    ("A5", "all", "deltaproduct", 2, 1): "solved",
    ("S5", "all", "deltaproduct", 4, 1): "1.00 to 150, .98 at 200, .86 at 256",
    ("S5", "all", "deltanet", 1, 1): "not solved",
    ("S5", "all", "deltanet", 1, 5): "not solved",
    ("S5", "only_swaps", "deltanet", 1, 1): "solved",
    ("S5", "three_permutations", "deltanet", 1, 5): "solved",
    ("S5", "four_tokens", "deltanet", 1, 5): "to some 200 tokens, 2 of 3 seeds",
}
PRODUCT_GROUPS = ("S3", "S4", "A5", "S5")  # one layer of DeltaProduct with [0, 1] does not solve these


def reported(parameters: dict[str, Any], mixer: str, range_: str, num_householder: int, num_layers: int) -> str:
    """Return the papers' finding for a task of a grid, a mixer and a range, or "-" if they have none.

    `num_householder` matters only for DeltaProduct; other mixers have one factor. `num_layers` matters only in word
    problems, where depth decides the outcome; the papers' models for formal languages have two layers in parity and
    three in modular arithmetic.
    """
    task = parameters["task"]
    if task == "group_word":
        group, variant = parameters.get("group", "S5"), parameters.get("variant", "all")
        if not isinstance(group, str) or not parameters.keys() <= {"task", "group", "variant"}:
            return "-"  # a custom group, or custom inputs
        if range_ == "positive":
            is_reported = group in PRODUCT_GROUPS and (variant, mixer, num_layers) == ("all", "deltaproduct", 1)
            return "not solved" if is_reported else "-"
        factors = num_householder if mixer == "deltaproduct" else 1
        return WORDS.get((group, variant, mixer, factors, num_layers), "-")
    if parameters.get("running_values"):
        return "-"
    if task == "modular_arithmetic_brackets":
        task += f" {parameters.get('operators', '+-*')}"
    return REPORTED.get((task, mixer, range_), "-") if parameters.get("modulus", 5) == 5 else "-"
