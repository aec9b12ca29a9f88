"""Convert a tokenizer to a Hugging Face tokenizer that gives the ids that the model was trained on.

transformers' own conversion of SentencePiece merges by vocabulary order rather than by score, and therefore tokenises
runs of spaces (indentation) differently. In addition, a fast tokenizer matches control symbols in text by default.
"""

import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from lrnn.errors import UserError
from lrnn.tokenizer import HuggingFaceTokenizer, Tokenizer

SPACE = "\u2581"  # SentencePiece writes a space as this character
NO_LIMIT = int(1e30)  # transformers' value for no limit: a recurrent model reads texts of any length
SETTINGS = {
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": NO_LIMIT,
    "split_special_tokens": True,  # "</s>" spelled out in a text is text
}

ODD_TEXTS = (
    "",
    " ",
    "    indented\n\tby tab\r\n\r\n\n  ",
    "  two leading, two trailing  ",
    "x=1;y =2 ;\tz= 3",
    "naïve café — “quotes” … ½ ﬁ Å",
    "日本語 한국어 العربية עברית हिन्दी",
    "🙂🙃👩‍👩‍👧 \U0001f3f4\u200d",
    "zero\u0000byte \u200bwidth\ufeff \u2581 underscore",
    "0123456789 3.14e-10 0xDEADBEEF 1_000",
    "<s> and </s> and <unk> spelled out",
    "a" * 300 + " " * 300,
)


def convert_sentencepiece(model_file: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a SentencePiece BPE `.model`. It adds neither bos nor eos.

    Every way to cut a piece into two pieces is a merge. As in SentencePiece, merges are ranked by the score of the
    piece that they make.

    Args:
        model_file: the `.model` file.

    Raises:
        UserError: the file is not a BPE model with byte fallback, or the model changes white space.
    """
    spec = sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())
    if spec.trainer_spec.model_type != spec.trainer_spec.BPE or not spec.trainer_spec.byte_fallback:
        raise UserError(f"{model_file} cannot be exported: only SentencePiece BPE models with byte fallback can")
    if spec.normalizer_spec.remove_extra_whitespaces:
        raise UserError(f"{model_file} cannot be exported: it removes extra white space, and with it indentation")
    if spec.trainer_spec.treat_whitespace_as_suffix or not spec.normalizer_spec.escape_whitespaces:
        raise UserError(f"{model_file} cannot be exported: it does not write a space as {SPACE} in front of a word")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    unk, eos = sp.id_to_piece(sp.unk_id()), sp.id_to_piece(sp.eos_id())
    tokenizer = Backend(models.BPE(*_vocabulary_and_merges(sp), unk_token=unk, fuse_unk=True, byte_fallback=True))
    steps: list = []
    if spec.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.normalizer_spec.precompiled_charsmap))
    dummy_prefix = spec.normalizer_spec.add_dummy_prefix
    if dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(to_text)
    tokenizer.add_tokens([AddedToken(s, normalized=False) for s in spec.trainer_spec.user_defined_symbols])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=sp.id_to_piece(sp.bos_id()) if sp.bos_id() >= 0 else None,
        eos_token=eos,
        unk_token=unk,
        pad_token=eos,  # padding is masked, and a separate token would need a row of the embedding
        **SETTINGS,
    )


def export_tokenizer(trained: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """Write the tokenizer that a model was trained with into its exported folder, and compare the two on real text.

    As in training, the written tokenizer adds neither bos nor eos, and encodes a special token spelled out in a text
    as text. It pads on the left. A SentencePiece `tokenizer.model` is copied beside it.

    Args:
        trained: the tokenizer, from `load_tokenizer`.
        folder: where to write; created if missing.

    Returns:
        The tokenizer, read back from the folder.

    Raises:
        UserError: the tokenizer cannot be converted, or a text gets other ids or is decoded differently.
    """
    trained.save(folder)
    if trained.kind == "sentencepiece":
        tokenizer = convert_sentencepiece(folder / "tokenizer.model")
    else:
        assert isinstance(trained, HuggingFaceTokenizer)
        backend = Backend.from_str(trained.backend.to_str())
        backend.post_processor = None  # which may add bos or eos
        settings = {"pad_token": trained.special_tokens["eos_token"], **trained.special_tokens}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, **{**trained.other_settings, **settings, **SETTINGS}
        )
    save_tokenizer(tokenizer, folder)
    written = PreTrainedTokenizerFast.from_pretrained(folder)
    spelled_out = [f"{token}a{token}b {token} {token}" for token in written.get_added_vocab()]
    compare_tokenizers(written, trained, real_texts() + spelled_out)
    return written


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer so that transformers 4 and 5 read it in the same way."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name that 4 does not know
    # auto_map names code of the tokenizer's author, which would run wherever lrnn's model code is trusted.
    for key in ("backend", "add_bos_token", "add_eos_token", "is_local", "local_files_only", "auto_map"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def compare_tokenizers(tokenizer: PreTrainedTokenizerFast, trained: Tokenizer, texts: Sequence[str]) -> None:
    """Encode and decode texts with both tokenizers, and compare.

    Raises:
        UserError: a text gets different ids, or its ids are decoded differently.
    """
    for text, theirs in zip(texts, trained.encode_batch(texts), strict=True):
        ours = tokenizer(text).input_ids
        if ours != theirs:
            shorter = min(len(ours), len(theirs))
            at = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
            raise UserError(
                f"the exported tokenizer differs from the trained one at token {at} of {text[:60]!r}...: "
                f"{tokenizer.convert_ids_to_tokens(ours[at : at + 4])} instead of "
                f"{tokenizer.convert_ids_to_tokens(theirs[at : at + 4])}"
            )
        if tokenizer.decode(ours) != trained.decode(theirs):
            raise UserError(f"the exported tokenizer decodes the ids of {text[:60]!r}... unlike the trained one")


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


def _vocabulary_and_merges(sp: sentencepiece.SentencePieceProcessor) -> tuple[dict[str, int], list[tuple[str, str]]]:
    n = sp.vocab_size()
    vocabulary = {sp.id_to_piece(i): i for i in range(n)}
    merges = []
    for i in range(n):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i):
            continue
        piece = sp.id_to_piece(i)
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-sp.get_score(i), i, left, right, (piece[:cut], piece[cut:])))
    merges.sort(key=lambda m: m[:4])
    return vocabulary, [m[4] for m in merges]
