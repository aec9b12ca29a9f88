"""Write a tokenizer as transformers reads it, with the ids that the model was trained on, and compare the two."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from transformers import BertGenerationTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lrnn.errors import UserError
from lrnn.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from lrnn.tokenizer_export import as_tokenizers, real_texts, spelled_out

SENTENCEPIECE_FILE = "spiece.model"  # the name that BertGenerationTokenizer reads
NO_LIMIT = int(1e30)  # transformers' value for no limit: a recurrent model reads texts of any length
SETTINGS = {
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": NO_LIMIT,
    "split_special_tokens": True,  # "</s>" spelled out in a text is text
}


def export_tokenizer(trained: Tokenizer, folder: Path) -> PreTrainedTokenizerBase:
    """Write the tokenizer that a model was trained with into its exported folder, and compare the two on real text.

    As in training, the written tokenizer adds neither bos nor eos, and encodes a special token spelled out in a text
    as text. It pads on the left. A SentencePiece model is copied beside it.

    Args:
        trained: the tokenizer, from `load_tokenizer`.
        folder: where to write; created if missing.

    Returns:
        The tokenizer, read back from the folder.

    Raises:
        UserError: the tokenizer cannot be converted, or a text gets other ids or is decoded differently.
    """
    trained.save(folder)
    backend = as_tokenizers(trained)
    names = _special_tokens(trained)
    if backend is None:
        assert isinstance(trained, SentencePieceTokenizer)
        os.replace(folder / "tokenizer.model", folder / SENTENCEPIECE_FILE)
        tokenizer = BertGenerationTokenizer(str(folder / SENTENCEPIECE_FILE), **names, **SETTINGS)
        save_tokenizer(tokenizer, folder, "BertGenerationTokenizer")
        written = BertGenerationTokenizer.from_pretrained(folder)
    else:
        others = trained.other_settings if isinstance(trained, HuggingFaceTokenizer) else {}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{**others, **names, **SETTINGS})
        save_tokenizer(tokenizer, folder, "PreTrainedTokenizerFast")
        written = PreTrainedTokenizerFast.from_pretrained(folder)
    compare_tokenizers(written, trained, real_texts() + spelled_out(list(written.get_added_vocab())))
    return written


def _special_tokens(trained: Tokenizer) -> dict[str, str]:
    """Return the names of special tokens. The one that begins a document is bos, even where it is the eos."""
    if isinstance(trained, HuggingFaceTokenizer):
        names = dict(trained.special_tokens)
    else:
        assert isinstance(trained, SentencePieceTokenizer)
        names = {"eos_token": trained.piece(trained.eos_token_id), "unk_token": trained.piece(trained.unk_token_id)}
        if trained.bos_token_id is not None:
            names["bos_token"] = trained.piece(trained.bos_token_id)
        names["sep_token"] = names["eos_token"]  # BertGenerationTokenizer would add one of its own
    eos = names["eos_token"]
    # Padding is masked, and a separate token would need a row of the embedding.
    return {"bos_token": eos, "pad_token": eos, **names}


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, tokenizer_class: str) -> None:
    """Write the tokenizer so that transformers 4 and 5 read it in the same way, as `tokenizer_class`."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = tokenizer_class  # transformers 5 writes a name that 4 does not know
    # auto_map names code of the tokenizer's author, which would run wherever lrnn's model code is trusted.
    for key in ("backend", "is_local", "local_files_only", "auto_map", "sp_model_kwargs", "vocab_file"):
        config.pop(key, None)
    # A text begins with bos, as documents did in training. Neither class acts on this key by itself; `lrnn eval` does.
    config["add_bos_token"], config["add_eos_token"] = True, False
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def compare_tokenizers(tokenizer: PreTrainedTokenizerBase, trained: Tokenizer, texts: Sequence[str]) -> None:
    """Encode and decode texts with both tokenizers, and compare.

    Raises:
        UserError: a text gets different ids, or its ids are decoded differently.
    """
    unknown = trained.unk_token_id if isinstance(trained, SentencePieceTokenizer) else None
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
        if unknown not in theirs and tokenizer.decode(ours) != trained.decode(theirs):
            raise UserError(f"the exported tokenizer decodes the ids of {text[:60]!r}... unlike the trained one")
