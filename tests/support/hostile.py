"""Files that leave a mark if they are executed, and the careless ways to load them, which prove that they do."""

import json
import os
import pickle
import sys
from pathlib import Path

import clean_process


class _Opens:
    """An object whose pickle opens a file for writing when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def hostile_pickle(mark: Path) -> bytes:
    return pickle.dumps({"weight": _Opens(mark)}, protocol=2)


def hostile_yaml(mark: Path) -> str:
    return f"run_dir: !!python/object/apply:os.system ['touch {mark}']\n"


def hostile_python(mark: Path) -> str:
    """Return code that makes the mark, to be put in front of a module or used as one."""
    return f"open({str(mark)!r}, 'w').close()\n"


def add_hostile_code(tokenizer: Path, mark: Path, *, known_class: bool, elsewhere: bool = False) -> None:
    """Give a tokenizer folder its own code.

    Args:
        mark: file that the code makes.
        known_class: whether transformers also has the class that the folder names, and does not need the code.
        elsewhere: name the code by a path, so that copies of the folder without the code find it.
    """
    (tokenizer / "tokenization_own.py").write_text(
        hostile_python(mark)
        + "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    path = tokenizer / "tokenizer_config.json"
    config = json.loads(path.read_text())
    prefix = f"{tokenizer.resolve()}--" if elsewhere else ""
    reference = f"{prefix}tokenization_own.OwnTokenizer"
    config["auto_map"] = {"AutoTokenizer": [reference, reference]}
    config["tokenizer_class"] = "PreTrainedTokenizerFast" if known_class else "OwnTokenizer"
    path.write_text(json.dumps(config))


def load_carelessly(code: str, work: Path) -> None:
    """Run Python code in a process without lrnn. It may fail, since only the mark matters."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
    program = f"import sys\nsys.modules['lrnn'] = None\n{code}"
    clean_process.run([sys.executable, "-I", "-c", program], cwd=work, env=env)


def tokenizer_carelessly(folder: Path) -> str:
    return f"import transformers\ntransformers.AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)"


def pickle_carelessly(file: Path) -> str:
    """Return what `torch.load(file, weights_only=False)` does with a file that is not a ZIP archive, without torch."""
    return f"import pickle\npickle.load(open({str(file)!r}, 'rb'))"
