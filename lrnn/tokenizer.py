"""Load SentencePiece and Hugging Face tokenizers behind one small interface, and train new ones."""

import hashlib
import io
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lrnn.errors import UserError, first_line
from lrnn.files import LFS_POINTER, NOT_FETCHED

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
OTHER_SETTINGS = ("chat_template", "model_max_length")  # of tokenizer_config.json; they do not decide ids
COPY_MARK = "lrnn_copy"  # this key of tokenizer_config.json says that the ids are those of tokenizer.json alone
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")  # in a folder; the second is transformers' name for some
TRAIN_CHUNK_CHARS = 4000  # SentencePiece trains on "sentences": here, runs of whole lines of about this length


class Tokenizer(ABC):
    """The interface of a tokenizer.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        fingerprint: SHA-256 (hex) of what decides ids: a SentencePiece model, or `tokenizer.json` with the ids that
            begin and end a document.
        file_sha256: SHA-256 (hex) of the model file (`tokenizer.model`, `tokenizer.json`).
        vocab_size: one more than the largest id.
        bos_token_id: id that starts a document, or None.
        eos_token_id: id that ends a document.
    """

    kind: str
    fingerprint: str
    file_sha256: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. Special tokens are not added, and are encoded as text if spelled out."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Copy the tokenizer into `folder`, which is created if missing. The copy gives the same ids."""

    @property
    def document_prefix(self) -> list[int]:
        """Return the ids before a document: bos, or eos if there is no bos, because the first token needs a context."""
        return [self.eos_token_id if self.bos_token_id is None else self.bos_token_id]

    @property
    def document_suffix(self) -> list[int]:
        """Return the ids after a document."""
        return [self.eos_token_id]

    def description(self) -> dict:
        """Return the tokenizer's entry in the manifest of a corpus."""
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
        }


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file. Control symbols such as `</s>` are never matched in text."""

    kind = "sentencepiece"

    def __init__(self, path: Path):
        import sentencepiece

        self.path = path
        self.label = str(path)
        model = path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"tokenizer {path}: {_why_not_sentencepiece(model, error)}") from error
        if self._processor.eos_id() < 0:
            raise UserError(
                f"tokenizer {path}: it has no end-of-sentence id (eos_id=-1), which must end every document"
            )
        self.model = model
        self.piece: Callable[[int], str] = self._processor.id_to_piece
        self.fingerprint = self.file_sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        bos = self._processor.bos_id()
        self.bos_token_id = bos if bos >= 0 else None
        self.eos_token_id = self._processor.eos_id()
        self.unk_token_id: int = self._processor.unk_id()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread, because the corpus is built by one process per core.
        return self._processor.encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, folder / "tokenizer.model")


def _why_not_sentencepiece(content: bytes, error: Exception) -> str:
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", content):
        return "a tiktoken vocabulary, which lacks the rule that splits text; give a folder with its tokenizer.json"
    if content.startswith(LFS_POINTER):
        return NOT_FETCHED
    return f"not a SentencePiece model ({error})"


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, whose rules alone decide the ids of a text.

    transformers has classes (GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer ...) that replace some of these rules by
    their own, depending on `tokenizer_config.json`, on `config.json` and on the version of transformers. They are not
    used here: the ids are those of `tokenizers.Tokenizer.from_file`.

    Args:
        label: what messages call the tokenizer.
        content: the bytes of `tokenizer.json`.
        settings: content of `tokenizer_config.json`, with `bos_token` and `eos_token` as strings or None.
        chat_template: content of `chat_template.jinja`, or None. It is kept for the copies.

    Raises:
        UserError: the tokenizer cannot be read, has no end of documents, is random, or takes text for special tokens.
    """

    kind = "huggingface"

    def __init__(self, label: str, content: bytes, settings: dict[str, Any], chat_template: bytes | None = None):
        import tokenizers

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the corpus is built by one process per core
        self._content, self._chat_template = content, chat_template
        try:
            backend = tokenizers.Tokenizer.from_str(content.decode())
            dropout = json.loads(content)["model"].get("dropout")
        except Exception as error:  # tokenizers raises no narrower class
            raise UserError(f"tokenizer {label!r}: its tokenizer.json cannot be read ({error})") from error
        if dropout:
            raise UserError(
                f"tokenizer {label!r}: its tokenizer.json has dropout {dropout}, which makes ids random; set it to null"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "</s>" in a source file is text, not the end of a document
        self.backend = backend
        names = {name: settings[name] for name in SPECIAL_TOKENS if settings.get(name) is not None}
        unknown = [name for name, token in names.items() if backend.token_to_id(token) is None]
        for name in ("bos_token", "eos_token"):
            if name in unknown:
                raise UserError(f"tokenizer {label!r}: its {name} {names[name]!r} is not in tokenizer.json")
        if "eos_token" not in names:
            raise UserError(f"tokenizer {label!r}: it has no eos_token, which must end every document")
        self.special_tokens: dict[str, str] = {name: names[name] for name in names if name not in unknown}
        self.other_settings = {name: settings[name] for name in OTHER_SETTINGS if name in settings}
        self.vocab_size = max(backend.get_vocab().values()) + 1
        ids: dict[str, Any] = {name: backend.token_to_id(token) for name, token in self.special_tokens.items()}
        self.bos_token_id, self.eos_token_id = ids.get("bos_token"), ids["eos_token"]
        self.file_sha256 = hashlib.sha256(content).hexdigest()
        decisive = [self.file_sha256, self.bos_token_id, self.eos_token_id]
        self.fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
        for name, what in (("eos_token", "end-of-document"), ("bos_token", "start-of-document")):
            if name in names and ids[name] in self.encode_batch([names[name]])[0]:
                raise UserError(
                    f"tokenizer {label!r}: the literal text {names[name]!r} is encoded as its {what} id {ids[name]}; "
                    "mark the token as special in tokenizer.json"
                )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def description(self) -> dict:
        return super().description() | {"file_sha256": self.file_sha256}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self._content)
        settings = {
            COPY_MARK: 1,
            # transformers' class that reads tokenizer.json as it is, under the name that version 4 knows too.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            **self.special_tokens,
            **self.other_settings,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        if self._chat_template is not None:
            (folder / "chat_template.jinja").write_bytes(self._chat_template)


def _read_huggingface(name: str) -> HuggingFaceTokenizer:
    """Return the tokenizer of a folder with `tokenizer.json`, or of a name on the hub."""
    content, settings, chat_template = _huggingface_files(name)
    return HuggingFaceTokenizer(name, content, settings, chat_template)


def _huggingface_files(name: str) -> tuple[bytes, dict[str, Any], bytes | None]:
    """Return tokenizer.json, the settings with the special tokens' names, and the chat template of a tokenizer."""
    from transformers.utils import cached_file

    wanted = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    try:
        found = {file: cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in wanted}
        content = {file: Path(path).read_bytes() for file, path in found.items() if path is not None}
        settings, named = (json.loads(content.get(file, b"{}")) for file in wanted[1:3])
        if not content:
            raise FileNotFoundError("none of its files is found")
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer {name!r}: neither a local folder nor a tokenizer that can be reached on the hub "
            f"({first_line(error)})"
        ) from error
    if "tokenizer.json" not in content:
        raise UserError(f"tokenizer {name!r}: it has no tokenizer.json; give its SentencePiece .model file instead")
    if content["tokenizer.json"].startswith(LFS_POINTER):
        raise UserError(f"tokenizer {name!r}: its tokenizer.json is {NOT_FETCHED}")
    for file, values in zip(wanted[1:3], (settings, named), strict=True):
        if not isinstance(values, dict):
            raise UserError(f"tokenizer {name!r}: its {file} should hold a JSON object, not {type(values).__name__}")
    _check_needs_no_code(name, settings)
    settings = {**{token: named[token] for token in SPECIAL_TOKENS if token in named}, **settings}
    if not {"bos_token", "eos_token"} <= set(settings):
        of_class = _load_with_transformers(name)
        settings = {token: getattr(of_class, token) for token in ("bos_token", "eos_token")} | settings
    for token in SPECIAL_TOKENS:
        if isinstance(settings.get(token), dict):  # an AddedToken
            settings[token] = settings[token].get("content")
        if not isinstance(settings.get(token), str | None):
            raise UserError(f"tokenizer {name!r}: its {token} should be text, not {settings[token]!r}")
    return content["tokenizer.json"], settings, content.get("chat_template.jinja")


def _check_needs_no_code(name: str, settings: dict[str, Any]) -> None:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    named = settings.get("tokenizer_class") or ""
    if not isinstance(named, str):
        raise UserError(f"tokenizer {name!r}: its tokenizer_class should be text, not {named!r}")
    if "auto_map" in settings and all(tokenizer_class_from_name(n) is None for n in (named, f"{named}Fast")):
        raise UserError(f"tokenizer {name!r}: its class {named!r} needs code of its own, which is not run")


def _load_with_transformers(name: str) -> Any:
    """Return the tokenizer as transformers makes it, whose class may have rules and special tokens of its own."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # otherwise it asks on a terminal
    except Exception as error:  # a class that does not fit the files raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"tokenizer {name!r}: transformers cannot load it ({reason})") from error


def load_copy(folder: Path) -> Tokenizer:
    """Load the tokenizer of a corpus or a checkpoint, from the copy that is part of it.

    A Hugging Face tokenizer that lrnn 0.1.0 copied was used by the class that transformers chose for the copy. Where
    that class has other rules than `tokenizer.json`, the ids of the corpus are those of the class, so its rules are
    used here.

    Raises:
        UserError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer
    _, settings, chat_template = _huggingface_files(str(folder))
    return tokenizer if COPY_MARK in settings else _as_its_class(str(folder), tokenizer, settings, chat_template)


def _as_its_class(
    name: str, tokenizer: HuggingFaceTokenizer, settings: dict[str, Any], chat_template: bytes | None = None
) -> HuggingFaceTokenizer:
    """Return `tokenizer`, or one with the rules of the class that transformers chooses if these are others."""
    backend = _load_with_transformers(name).backend_tokenizer
    theirs, ours = json.loads(backend.to_str()), json.loads(tokenizer.backend.to_str())
    if all(theirs[part] == ours[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")):
        return tokenizer
    return HuggingFaceTokenizer(name, backend.to_str().encode(), settings, chat_template)


def fingerprint_of_0_1_0(path: str, tokenizer: Tokenizer) -> str | None:
    """Return the fingerprint that a tokenizer had in lrnn 0.1.0, or None if the ids of a text were others then.

    It was the SHA-256 of the file alone.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.fingerprint
    _, settings, _ = _huggingface_files(path)
    same = COPY_MARK in settings or _as_its_class(path, tokenizer, settings) is tokenizer
    return tokenizer.file_sha256 if same else None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a SentencePiece model file, a folder, or a name on the Hugging Face hub.

    A folder with `tokenizer.json` is read as a Hugging Face tokenizer, one with only `tokenizer.model` as
    SentencePiece. The folder `tokenizer/` of a corpus is such a folder. The ids of a Hugging Face tokenizer are those
    of its `tokenizer.json`, whatever class its other files name.

    Raises:
        UserError: the path holds no usable tokenizer, or the tokenizer has no id that ends a document.
    """
    local = Path(path)
    if local.is_file() and local.suffix != ".json":
        return SentencePieceTokenizer(local)
    if local.is_dir() and (local / "tokenizer.json").exists():
        return _read_huggingface(str(path))
    for file in SENTENCEPIECE_FILES:
        if local.is_dir() and (local / file).exists():
            return SentencePieceTokenizer(local / file)
    # The hub is asked only for possible names, because offline its answer takes minutes.
    if local.exists() or local.suffix in (".model", ".json") or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
        raise UserError(f"tokenizer {path}: {_why_none(local)}")
    return _read_huggingface(str(path))


def _why_none(path: Path) -> str:
    """Return why a path that is no name on the hub holds no tokenizer, and what to do."""
    if path.name == "tokenizer.json" and path.is_file():
        return f"give its folder, {path.parent}, whose tokenizer_config.json names the token that ends documents"
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        load = f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained('tokenizer')"
        return (
            "it has vocab.json and merges.txt, but no tokenizer.json; write one and name its folder: "
            f'python -c "from transformers import AutoTokenizer; {load}"'
        )
    tiktoken = next(iter(sorted(path.glob("*.tiktoken"))), None) if path.is_dir() else None
    if tiktoken is not None:
        return f"{tiktoken.name} lacks the rule that splits text; give a folder with the model's tokenizer.json"
    return "neither a SentencePiece .model file nor a folder with tokenizer.model or tokenizer.json"


def _training_chunks(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts at line ends into runs of about `TRAIN_CHUNK_CHARS` characters, keeping newlines."""
    for text in texts:
        chunk: list[str] = []
        length = 0
        for line in text.splitlines(keepends=True):
            chunk.append(line)
            length += len(line)
            if length >= TRAIN_CHUNK_CHARS:
                yield "".join(chunk)
                chunk, length = [], 0
        if chunk:
            yield "".join(chunk)


def check_trained_size(vocab_size: int) -> None:
    """Raise UserError if `train_sentencepiece` cannot make a vocabulary of this size from any text."""
    if vocab_size < 300:
        raise UserError(
            f"--train-tokenizer {vocab_size}: the 256 bytes and 3 special tokens alone need 259; give at least 300"
        )


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a SentencePiece BPE model and write it to `path`.

    The model preserves text (indentation, newlines, any byte), except the character U+2581, SentencePiece's own mark of
    a space, which `decode` does not return. The same texts give the same file.

    Raises:
        UserError: `vocab_size` is too small for the 256 bytes, or too large for the texts.
    """
    import sentencepiece

    check_trained_size(vocab_size)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_chunks(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 24,  # bytes; a longer "sentence" would be dropped
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=4,  # stored in the model, so a fixed number gives the same bytes on every machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"--train-tokenizer {vocab_size}: SentencePiece cannot make that vocabulary from the sample: "
            f"{str(error).rpartition('] ')[2]}"
        ) from error
    path.write_bytes(model.getvalue())
