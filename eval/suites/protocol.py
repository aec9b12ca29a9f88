"""Say how results were computed beyond their tasks' own files, and refuse to compare those that differ in it."""

from typing import Any

from lrnn.errors import UserError

Results = dict[str, Any]


def bos_rule(results: Results) -> tuple[str, list[int] | None]:
    """Return the rule for bos and the ids that prompts begin with, None if the result does not say."""
    settings = results.get("settings", {})
    if "bos" in settings:
        return settings["bos"], settings["bos_ids"]
    said = settings.get("add_bos_token")  # of lrnn 0.1.0 and before, which began with bos or with nothing
    return ("never", []) if said is False else ("auto", None)


def labels(results: Results) -> list[str]:
    """Return what differs from the defaults, as words for people, such as "bos never" and "num_fewshot 5"."""
    rule, _ = bos_rule(results)
    asked = [f"{key} {value}" for key, value in results.get("protocol", {}).items()]
    limit = results.get("limit")
    return [*([] if rule == "auto" else [f"bos {rule}"]), *asked, *([] if limit is None else [limit_label(limit)])]


def limit_label(limit: float) -> str:
    """Return the share of the documents of every task, for people."""
    return f"first {limit:g}" if limit >= 1 else f"first {limit:.4g} of the documents"


def check_comparable(first: Results, second: Results) -> None:
    """Raise UserError if two results have different rules for bos with different effects, or different protocols."""
    (rule, ids), (other_rule, other_ids) = bos_rule(first), bos_rule(second)
    known = ids is not None and other_ids is not None
    if rule != other_rule and known and bool(ids) != bool(other_ids):
        raise UserError(
            f"the results do not compare: prompts begin by the rule {_describe(rule, ids)} in the first, and "
            f"{_describe(other_rule, other_ids)} in the second; run one again with the other's --bos"
        )
    mine, other = first.get("protocol", {}), second.get("protocol", {})
    for key in (*mine, *other):
        if mine.get(key) != other.get(key):
            raise UserError(
                f"the results do not compare: {key} is {_value(mine, key)} in the first, and {_value(other, key)} in "
                "the second"
            )


def bos_note(first: Results, second: Results) -> str:
    """Return a line on two results under one rule that begins prompts with bos in one model only, else nothing."""
    (_, ids), (_, other) = bos_rule(first), bos_rule(second)
    if ids is None or other is None or bool(ids) == bool(other):
        return ""
    which = ("first", "second") if ids else ("second", "first")
    return f"Prompts begin with bos for the {which[0]} model and without for the {which[1]}, as each tokenizer says."


def _describe(rule: str, ids: list[int] | None) -> str:
    return f"bos {rule} ({'ids ' + ', '.join(map(str, ids)) if ids else 'no ids'})"


def _value(protocol: Results, key: str) -> str:
    return repr(protocol[key]) if key in protocol else "the default"
