"""What a whole job is given: documents in every form of data, and tokenizers of every kind, with the truth on both."""

import csv
import gzip
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])
EOS = "<|endoftext|>"
SPECIAL = [EOS, "<|im_start|>", "<|im_end|>", "<|eot_id|>"]

# Documents with everything that tokenizers treat in ways of their own.
DOCUMENTS = [
    *((STDLIB / name).read_text() for name in ("textwrap.py", "bisect.py", "heapq.py", "sched.py")),
    (STDLIB / "queue.py").read_text().replace("\n", "\r\n"),
    "naïve café — “quotes” … ½ ﬁ Å \u212b",
    "e\u0301 n\u0303 o\u0308\u0304 \u304b\u3099 \u1100\u1161\u11a8 Tie\u0302\u0301ng Vie\u0323\u0302t \u0958",
    "😀 👩\u200d👩\u200d👧 \U0001f3f4\u200d☠️ 1\ufe0f\u20e3 🇩🇪",
    "日本語の文。한국어 문장. العربية עברית हिन्दी ไทย\uff0c\uff11\uff12\uff13",
    "2024-11-30 1000000 3.14e-10 0xDEADBEEF 1_000 ١٢٣ ²³¹ 00:59",
    "    indented\n\ttab\n\n\n  x\r\n \r\n\t\t y   ",
    " one space before, two after  ",
    "\u00a0nbsp\u3000wide\u2028line\u2029par\x85nel\x0cff\x0bvt \u200bzero width",
    "I'm you're WE'LL they'd DON'T it's'; x" + "=" * 100 + " " * 100 + "y",
    f"a{EOS}b {EOS} </s><s> <unk> <|end_of_text|> <|padding|>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|> <pad> <bos> <eos>",
]
HELDOUT = [DOCUMENTS[i] for i in (5, 6, 8, 10, 14)]  # short ones


def _lines(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(DOCUMENTS)))
    return path


def _compressed(folder: Path, suffix: str) -> Path:
    content = _lines(folder, "plain.jsonl").read_bytes()
    path = folder / f"data.jsonl{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".gz" else pa.Codec("zstd").compress(content, asbytes=True))
    return path


def _array(folder: Path) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    return path


def _parquet(folder: Path, name: str = "data.parquet") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": DOCUMENTS}), path)
    return path


def _arrow(folder: Path) -> Path:
    feather.write_feather(pa.table({"text": DOCUMENTS}), folder / "data.arrow", compression="uncompressed")
    return folder / "data.arrow"


def _csv(folder: Path) -> Path:
    with open(folder / "data.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(DOCUMENTS)])
    return folder / "data.csv"


def _folder_of_lines(folder: Path) -> Path:
    for i, text in enumerate(DOCUMENTS):
        (folder / f"part-{i:02d}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return folder


def _folder_of_text(folder: Path) -> Path:
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i:02d}.py").write_bytes(text.encode())
    return folder


def _of_the_hub(folder: Path) -> Path:
    _parquet(folder, "data/train-00000-of-00001.parquet")
    card = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
    (folder / "README.md").write_text(f"---\n{card}---\n# Documents\n")
    return folder


def _saved(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(folder / "saved")
    return folder / "saved"


ROWS = "every row is a document, its text in column 'text'"


class Form(NamedTuple):
    """A form of data: what writes DOCUMENTS into an empty folder and returns the source, and what that is taken for."""

    write: Callable[[Path], Path]
    taken_for: str


FORMS = {
    "jsonl": Form(lambda folder: _lines(folder, "data.jsonl"), f"1 JSON file; {ROWS}"),
    "jsonl.gz": Form(lambda folder: _compressed(folder, ".gz"), f"1 JSON file; {ROWS}"),
    "jsonl.zst": Form(lambda folder: _compressed(folder, ".zst"), f"1 JSON file; {ROWS}"),
    "json": Form(_array, f"1 JSON file; {ROWS}"),
    "parquet": Form(_parquet, f"1 Parquet file; {ROWS}"),
    "arrow": Form(_arrow, f"1 Arrow file; {ROWS}"),
    "csv": Form(_csv, f"1 CSV file; {ROWS}"),
    "folder of jsonl": Form(_folder_of_lines, f"{len(DOCUMENTS)} JSON files; {ROWS}"),
    "folder of text": Form(_folder_of_text, f"{len(DOCUMENTS)} text files; every text file is a document"),
    "folder of the hub": Form(_of_the_hub, f"1 Parquet file; {ROWS}"),
    "saved data set": Form(_saved, f"1 Arrow file; {ROWS}"),
}

PLAIN = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SENTENCEPIECE = {  # options of spm_train
    "unigram": {},
    "bpe": {"model_type": "bpe"},
    "bpe of bytes": {**PLAIN, "byte_fallback": True},
    "bpe nmt_nfkc": {**PLAIN, "normalization_rule_name": "nmt_nfkc"},
    "bpe with symbols": {**PLAIN, "byte_fallback": True, "user_defined_symbols": ["<sep>", "<|im_start|>", "    "]},
    "unigram with symbols": {"user_defined_symbols": ["<sep>", "<|im_start|>"], "bos_id": -1},
    "word": {"model_type": "word"},
    "char": {"model_type": "char"},
}
CLASSES = {  # the class in tokenizer_config.json -> the model_type in config.json
    "PreTrainedTokenizerFast": "llama",
    "GPT2Tokenizer": "olmo2",
    "Qwen2Tokenizer": "qwen2",
    "GPTNeoXTokenizer": "gpt_neox",
    "LlamaTokenizer": "llama",
}


def train_sentencepiece(folder: Path, kind: str) -> Path:
    """Return a SentencePiece model that is trained as `SENTENCEPIECE[kind]` says."""
    text = [
        line for name in ("typing.py", "ast.py", "textwrap.py") for line in (STDLIB / name).read_text().splitlines()
    ]
    path = folder / "spm.model"
    with path.open("wb") as file:
        options = {"vocab_size": 600, "hard_vocab_limit": kind not in ("word", "char"), **SENTENCEPIECE[kind]}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, minloglevel=2, **options
        )
    return path


def train_byte_level(folder: Path, tokenizer_class: str) -> Path:
    """Return a folder with a byte-level BPE and a class whose own rules differ: it splits digits, and normalises."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([(STDLIB / name).read_text() for name in ("typing.py", "ast.py")], trainer)
    tokenizer.add_tokens(["<think>"])  # one that is found in text
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": EOS, "eos_token": EOS, "tokenizer_class": tokenizer_class}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "config.json").write_text(json.dumps({"model_type": CLASSES[tokenizer_class]}))
    return folder


def truth(tokenizer: Path) -> Callable[[str], list[int]]:
    """Return what encodes a document with the library that the tokenizer belongs to, bos and eos around it.

    Special tokens in the text of a document are text.
    """
    if tokenizer.suffix == ".model":
        model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        eos = model.eos_id()
        bos = model.bos_id() if model.bos_id() >= 0 else eos
        return lambda text: [bos, *model.encode(text), eos]
    published = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    published.encode_special_tokens = True
    names = AutoTokenizer.from_pretrained(tokenizer)  # GPT-2's class knows the names of its special tokens
    begin, end = (published.token_to_id(name) for name in (names.bos_token or names.eos_token, names.eos_token))
    return lambda text: [begin, *published.encode(text, add_special_tokens=False).ids, end]
