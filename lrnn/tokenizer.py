"""Load SentencePiece and Hugging Face tokenizers behind one small interface, and train new ones."""

import hashlib
import io
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lrnn.errors import UserError

TRAIN_CHUNK_CHARS = 4000  # SentencePiece trains on "sentences": here, runs of whole lines of about this length


class Tokenizer(ABC):
    """The interface of a tokenizer.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        fingerprint: SHA-256 (hex) of the model file (`tokenizer.model`, `tokenizer.json`).
        vocab_size: one more than the largest id.
        bos_token_id: id that starts a document, or None.
        eos_token_id: id that ends a document.
    """

    kind: str
    fingerprint: str
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
        """Copy the tokenizer's files, byte for byte, into `folder`, which is created if missing."""

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
        model = path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"tokenizer {path}: not a SentencePiece model ({error})") from error
        if self._processor.eos_id() < 0:
            raise UserError(
                f"tokenizer {path}: it has no end-of-sentence id (eos_id=-1), which must end every document"
            )
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        bos = self._processor.bos_id()
        self.bos_token_id = bos if bos >= 0 else None
        self.eos_token_id = self._processor.eos_id()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread, because the corpus is built by one process per core.
        return self._processor.encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, folder / "tokenizer.model")


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face fast tokenizer: a folder with `tokenizer.json`, or a name on the hub."""

    kind = "huggingface"

    def __init__(self, name: str):
        from transformers import AutoTokenizer
        from transformers.utils import cached_file

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the corpus is built by one process per core
        try:
            found = {
                file: cached_file(name, file, _raise_exceptions_for_missing_entries=False)
                for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
            }
            self._files = {file: Path(path) for file, path in found.items() if path is not None}
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # otherwise it asks on a terminal
        except (OSError, ValueError) as error:
            raise UserError(
                f"tokenizer {name!r}: neither a local folder nor a tokenizer that can be reached on the hub, or it "
                f"needs code of its own, which is not run ({str(error).splitlines()[0]})"
            ) from error
        if "tokenizer.json" not in self._files or not tokenizer.is_fast:
            raise UserError(f"tokenizer {name!r}: it has no tokenizer.json; give its SentencePiece .model file instead")
        if tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {name!r}: it has no eos_token, which must end every document")
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # "</s>" in a source file is text, not the end of a document
        self.fingerprint = hashlib.sha256(self._files["tokenizer.json"].read_bytes()).hexdigest()
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = tokenizer.eos_token_id
        if self.eos_token_id in self.encode_batch([tokenizer.eos_token])[0]:
            raise UserError(
                f"tokenizer {name!r}: the literal text {tokenizer.eos_token!r} is encoded as its end-of-document id "
                f"{self.eos_token_id}; mark the token as special in tokenizer.json"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in self._files.items():
            shutil.copyfile(path, folder / name)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a SentencePiece `.model` file, a folder, or a name on the Hugging Face hub.

    A folder with `tokenizer.json` is read as a Hugging Face tokenizer, one with only `tokenizer.model` as
    SentencePiece. The folder `tokenizer/` of a corpus is such a folder.

    Raises:
        UserError: the path holds no usable tokenizer, or the tokenizer has no id that ends a document.
    """
    local = Path(path)
    if local.is_file() and local.suffix == ".model":
        return SentencePieceTokenizer(local)
    if local.is_dir() and (local / "tokenizer.json").exists():
        return HuggingFaceTokenizer(str(path))
    if local.is_dir() and (local / "tokenizer.model").exists():
        return SentencePieceTokenizer(local / "tokenizer.model")
    # The hub is asked only for possible names, because offline its answer takes minutes.
    if local.exists() or local.suffix in (".model", ".json") or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
        raise UserError(
            f"tokenizer {path}: neither a SentencePiece .model file nor a folder with tokenizer.model or tokenizer.json"
        )
    return HuggingFaceTokenizer(str(path))


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
