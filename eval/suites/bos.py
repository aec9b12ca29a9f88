"""The rule for the beginning-of-sequence token: which ids a prompt begins with.

A state-space model or linear RNN that was trained on documents behind bos has always seen that id first. What published
tables do differs, so the rule is an option, and part of every result.
"""

from dataclasses import dataclass
from typing import Any

from lrnn.errors import UserError

RULES = {
    "auto": "as trained: add_bos_token of tokenizer_config.json, or what the tokenizer itself does",
    "always": "bos, or eos where there is none",
    "never": "the text alone",
}


@dataclass(frozen=True)
class Bos:
    """A rule, and the ids that it puts in front of a prompt: one, none, or the several of some tokenizers."""

    rule: str
    ids: tuple[int, ...]


def decide(rule: str, tokenizer: Any, said: bool | None) -> Bos:
    """Return what a rule means for a tokenizer.

    Args:
        rule: one of `RULES`.
        tokenizer: transformers' tokenizer of the model.
        said: `add_bos_token` of its tokenizer_config.json, None if that does not say.

    Raises:
        UserError: the rule is unknown, the tokenizer has neither bos nor eos, or what it does itself is unclear.
    """
    if rule not in RULES:
        raise UserError(f"--bos must be one of {', '.join(RULES)}; it is {rule!r}")
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise UserError("the tokenizer has neither bos nor eos: nothing can begin a document, which lm-eval needs")
    if rule == "auto" and said is None:
        return Bos(rule, own_prefix(tokenizer))
    return Bos(rule, (first,) if rule == "always" or (rule == "auto" and said) else ())


def own_prefix(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that a tokenizer itself puts in front of a text. Raise UserError if it changes the text's ids."""
    plain, whole = (list(tokenizer("a", add_special_tokens=special).input_ids) for special in (False, True))
    start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), None)
    if start is None:
        raise UserError(
            f"the tokenizer has the ids {plain} for the text 'a', and {whole} with special tokens, so what a prompt "
            "begins with is unknown: give --bos always or --bos never"
        )
    return tuple(whole[:start])
