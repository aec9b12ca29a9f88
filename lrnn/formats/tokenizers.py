"""Whether two tokenizers give the same ids, whatever files they are read from."""

from lrnn.tokenizer import Tokenizer
from lrnn.tokenizer_export import real_texts


def difference(given: Tokenizer, expected: Tokenizer) -> str | None:
    """Return how ids of `given` differ from those of `expected`, or None if they do not.

    The same rules may be in files of different kinds, as an export has a `tokenizer.json` where the corpus has a
    SentencePiece model. So the ids of real texts, and those around a document, are compared.
    """
    if given.fingerprint == expected.fingerprint:
        return None
    for what in ("document_prefix", "document_suffix"):
        ours, theirs = getattr(given, what), getattr(expected, what)
        if ours != theirs:
            where = "begin" if what == "document_prefix" else "end"
            return f"documents {where} with the id {ours[0]}, not {theirs[0]}"
    texts = real_texts()
    for text, ours, theirs in zip(texts, given.encode_batch(texts), expected.encode_batch(texts), strict=True):
        if ours != theirs:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            at = min(len(ours), len(theirs)) if at is None else at
            return f"the ids of {text[:40]!r} are {ours[at : at + 4]} from token {at} on, not {theirs[at : at + 4]}"
    return None
