"""Convert SentencePiece BPE models into `tokenizers` with the same ids.

transformers' own conversion merges by vocabulary order rather than by score, and therefore tokenises runs of spaces
(indentation) differently. Its normaliser takes the shortest rule that fits a grapheme and drops the rest of it, where
SentencePiece takes the longest rule and continues behind it.
"""

import unicodedata
from typing import Any

from lrnn.errors import UserError

SPACE = "\u2581"  # SentencePiece writes a space as this character
# These characters are unassigned, end a grapheme, and combine with nothing. They separate characters for a while.
APART, ALONE = "\ufff1", "\ufff2"
START = "\U0010fff0"  # private: the place of the space that SentencePiece writes in front of a text
SYMBOLS = 0x100000  # private characters that stand for the user-defined symbols, which are never merged
COMPOSED = range(0xA0, 0x30000)  # code points that may be compositions of others
SYLLABLES = "\uac00-\ud7a3"  # Hangul
LEVELS = 3  # marks that compose with one character, at most: Greek has 3


def why_not_convertible(spec: Any) -> str | None:
    """Return the reason why a model cannot be converted, or None. `spec` is the parsed `ModelProto`."""
    if spec.trainer_spec.model_type != spec.trainer_spec.BPE:
        return "it is not a BPE model"
    if spec.trainer_spec.treat_whitespace_as_suffix or not spec.normalizer_spec.escape_whitespaces:
        return f"it does not write a space as {SPACE} in front of a word"
    return None


def convert_bpe(model: bytes) -> Any:
    """Return a `tokenizers.Tokenizer` with the ids of a SentencePiece BPE model. It adds neither bos nor eos.

    Every way to cut a piece into two pieces is a merge. As in SentencePiece, merges are ranked by the score of the
    piece that they make.

    Args:
        model: the bytes of the `.model` file.

    Raises:
        UserError: the model is of another kind.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models

    spec = sentencepiece_model_pb2.ModelProto.FromString(model)
    reason = why_not_convertible(spec)
    if reason:
        raise UserError(f"the SentencePiece model cannot be converted: {reason}")
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    symbols = [piece.piece for piece in spec.pieces if piece.type == piece.USER_DEFINED]
    # SentencePiece finds symbols after it has written spaces in its own way, so one with a space is never found.
    found = [symbol for symbol in symbols if " " not in symbol]
    # An added token splits the text before it is normalised, so that each part would get a space in front.
    simple = not spec.normalizer_spec.add_dummy_prefix and not spec.normalizer_spec.precompiled_charsmap
    stands_for = {} if simple else {symbol: chr(SYMBOLS + i) for i, symbol in enumerate(found)}
    vocabulary, merges = _vocabulary_and_merges(sp, set(symbols))
    vocabulary = {stands_for.get(piece, piece): id for piece, id in vocabulary.items()}
    unk = sp.id_to_piece(sp.unk_id())
    byte_fallback = spec.trainer_spec.byte_fallback
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback))
    tokenizer.normalizer = _normalizer(spec.normalizer_spec, stands_for)
    texts = spec.normalizer_spec
    # SentencePiece's decoder removes the space in front, and every one if the encoder keeps none there.
    leading = 1 << 16 if texts.remove_extra_whitespaces else int(texts.add_dummy_prefix)
    strip = [decoders.Strip(" ", leading, 0)] if leading else []
    named = [decoders.Replace(char, symbol) for symbol, char in stands_for.items()]
    to_text = [*named, decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(to_text)
    if simple:
        tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in found])
    return tokenizer


def _vocabulary_and_merges(sp: Any, symbols: set[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    n = sp.vocab_size()
    vocabulary = {sp.id_to_piece(i): i for i in range(n)}
    merges = []
    for i in range(n):
        piece = sp.id_to_piece(i)
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i) or piece in symbols:
            continue
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None and not {piece[:cut], piece[cut:]} & symbols:
                merges.append((-sp.get_score(i), i, left, right, (piece[:cut], piece[cut:])))
    merges.sort(key=lambda m: m[:4])
    return vocabulary, [m[4] for m in merges]


def _normalizer(spec: Any, stands_for: dict[str, str]) -> Any:
    """Return what SentencePiece's normaliser does, step by step; `spec` is the `NormalizerSpec`."""
    from tokenizers import Regex, normalizers

    def replace(pattern: str, content: str) -> Any:
        return normalizers.Replace(Regex(pattern), content)

    steps: list[Any] = [
        normalizers.Replace(symbol, stands_for[symbol]) for symbol in sorted(stands_for, key=len, reverse=True)
    ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(START))
    if spec.precompiled_charsmap:
        steps += _rules(spec)
    if spec.remove_extra_whitespaces:
        steps += [replace(" {2,}", " "), replace(rf"(?<=\A{START}) |\A ", "")]
    steps += [normalizers.Replace(" ", SPACE), normalizers.Replace(START, SPACE)]
    if spec.remove_extra_whitespaces:
        steps.append(replace(rf"{SPACE}+\z", ""))
    return normalizers.Sequence(steps)


def _rules(spec: Any) -> list[Any]:
    """Return normalisers that replace the longest rule of the model at each place, as SentencePiece does.

    tokenizers applies such rules to whole graphemes. Here every character is set apart first, so that rules for one
    character are exact. Then characters that the model composes are brought together, one mark after the other.
    """
    from tokenizers import Regex, normalizers

    normalize = _rules_alone(spec)
    candidates = [c for c in map(chr, COMPOSED) if len(unicodedata.normalize("NFKC", c)) > 1]
    long = "".join(c for c, text in zip(candidates, normalize(candidates), strict=True) if len(text) > 1)
    # The model composes a base and its marks, but not a character of its own with a further mark.
    whole = "".join(c for c in map(chr, COMPOSED) if _is_composed(c))
    before = f"|(?=[{long}])" if long else ""
    alone = Regex(rf"(?!\A)(?:(?<=[{SYLLABLES}{whole}{long}]){before})(?!\z)")
    steps: list[Any] = [normalizers.Replace(alone, ALONE)]
    steps.append(normalizers.Replace(Regex(r"(?!\A)(?:(?=[^ -~])|(?<=[^ -~]))(?!\z)"), APART))
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    joined = _composable(normalize)
    if joined:
        together = "|".join(f"{APART}(?=[{second}])(?<=[{first}]{APART})" for first, second in joined)
        steps += [normalizers.Replace(Regex(together), ""), normalizers.NFC()] * LEVELS
    return [*steps, normalizers.Replace(Regex(f"[{APART}{ALONE}]"), "")]


def _rules_alone(spec: Any) -> Any:
    """Return a function that applies the character rules of a model, and nothing else, to a list of texts."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    alone = sentencepiece_model_pb2.NormalizerSpec()
    alone.CopyFrom(spec)
    alone.add_dummy_prefix = alone.remove_extra_whitespaces = alone.escape_whitespaces = False
    normalizer = sentencepiece.SentencePieceNormalizer(model_proto=_model_with(alone))
    return normalizer.normalize


def _model_with(spec: Any) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.normalizer_spec.CopyFrom(spec)
    unknown = model.pieces.add()
    unknown.piece, unknown.type = "<unk>", unknown.UNKNOWN
    return model.SerializeToString()


def _composable(normalize: Any) -> list[tuple[str, str]]:
    """Return the pairs of characters that the model composes, as character classes (firsts, second)."""
    pairs = []
    for c in map(chr, COMPOSED):
        parts = unicodedata.decomposition(c).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            pair = "".join(chr(int(part, 16)) for part in parts)
            if unicodedata.normalize("NFC", pair) == c:
                pairs.append((pair, c))
    spelled_out = normalize([unicodedata.normalize("NFD", c) for _, c in pairs])
    by_second: dict[str, str] = {}
    for (pair, c), text in zip(pairs, spelled_out, strict=True):
        if text == c:
            by_second[pair[1]] = by_second.get(pair[1], "") + pair[0]
    joined = [(firsts, second) for second, firsts in by_second.items()]
    if normalize(["\u1100\u1161\u11a8"]) == ["\uac01"]:  # Hangul: initial, vowel, final
        syllables = "".join(chr(c) for c in range(0xAC00, 0xD7A4, 28))
        joined += [("\u1100-\u1112", "\u1161-\u1175"), (syllables, "\u11a8-\u11c2")]
    return joined


def _is_composed(c: str) -> bool:
    """Return whether a character that is no mark is canonically equivalent to several others."""
    parts = unicodedata.decomposition(c)
    return bool(parts) and not parts.startswith("<") and not unicodedata.combining(c)
