"""Decide how transformers can serve a tokenizer with the ids that training uses, and check it on text.

A `tokenizer.json` is served as it is. A SentencePiece BPE model is converted (see `sentencepiece_bpe`). Any other
SentencePiece model is served by transformers' class that calls the sentencepiece library itself: tokenizers' own
unigram model adds up scores in float64 instead of float32, and so decides ties in another way.
"""

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.sentencepiece_bpe import convert_bpe, why_not_convertible
from lrnn.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

ODD_TEXTS = (
    "",
    " ",
    "    indented\n\tby tab\r\n\r\n\n  ",
    "  two leading, two trailing  ",
    "x=1;y =2 ;\tz= 3",
    "naïve café — “quotes” … ½ ﬁ Å",
    "日本語 한국어 العربية עברית हिन्दी",
    "Tie\u0302\u0301ng Vie\u0323\u0302t, n\u0303 o\u0308\u0304 e\u0301\u0302, \u304b\u3099, \u1100\u1161\u11a8",
    "🙂🙃👩‍👩‍👧 \U0001f3f4\u200d 1\ufe0f\u20e3",
    "zero\u0000byte \u200bwidth\ufeff \u2581 underscore",
    "0123456789 3.14e-10 0xDEADBEEF 1_000",
    "<s> and </s> and <unk> spelled out",
    "a" * 300 + " " * 300,
)
CHECKED_BEFORE_TRAINING = 30  # pieces of real text; the exporter compares all


def real_texts() -> list[str]:
    """Return text that every machine has: pieces of the running Python's source files, and odd strings."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = list(ODD_TEXTS)
    for name in ("argparse.py", "textwrap.py", "json/decoder.py", "LICENSE.txt", "pydoc_data/topics.py"):
        path = stdlib / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")[:200_000]
            texts += [text[i : i + 2000] for i in range(0, len(text), 2000)]
    return texts


def spelled_out(names: Sequence[str]) -> list[str]:
    """Return texts that contain the names of special tokens."""
    return [f"{name}a{name}b {name} {name}" for name in names]


def as_tokenizers(trained: Tokenizer) -> Any | None:
    """Return a `tokenizers.Tokenizer` that gives the ids of `trained` and adds none.

    Returns:
        None if it is a SentencePiece model that transformers' BertGenerationTokenizer serves by calling sentencepiece.

    Raises:
        UserError: transformers has no tokenizer that encodes and decodes as this one does.
    """
    import tokenizers

    if isinstance(trained, HuggingFaceTokenizer):
        backend = tokenizers.Tokenizer.from_str(trained.backend.to_str())
        backend.post_processor = None  # which may add bos or eos
        return backend
    assert isinstance(trained, SentencePieceTokenizer)
    from sentencepiece import sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto.FromString(trained.model)
    reason = why_not_convertible(spec)
    if reason is None:
        return convert_bpe(trained.model)
    # That class decodes by joining pieces and removing white space at both ends.
    if spec.trainer_spec.byte_fallback or not spec.normalizer_spec.remove_extra_whitespaces:
        kept = "has byte fallback" if spec.trainer_spec.byte_fallback else "keeps extra white space"
        raise UserError(
            f"tokenizer {trained.label} cannot be exported: {reason} and {kept}, which no tokenizer of transformers "
            "decodes exactly; train it with --model_type=bpe, or with --byte_fallback=false and "
            "--remove_extra_whitespaces=true"
        )
    return None


def check_exportable(trained: Tokenizer) -> None:
    """Raise UserError if a model that is trained with this tokenizer could not be exported with it."""
    backend = as_tokenizers(trained)
    if backend is None or not isinstance(trained, SentencePieceTokenizer):
        return  # The same rules are used by the same library.
    backend.encode_special_tokens = True
    texts = real_texts()[: len(ODD_TEXTS) + CHECKED_BEFORE_TRAINING]
    theirs = [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]
    for text, ours, wanted in zip(texts, theirs, trained.encode_batch(texts), strict=True):
        if ours != wanted:
            raise UserError(
                f"a model trained with the tokenizer {trained.label} could not be exported: transformers would encode "
                f"{text[:60]!r} as {ours[:8]}..., the tokenizer does as {wanted[:8]}...; use another tokenizer"
            )
