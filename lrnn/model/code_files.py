"""Write the code of a model beside its saved weights. Copied into exported folders.

`auto_map` in config.json names two entry files. From a local folder, transformers before 5.10 copies only these and the
files that they import by name, and not what those import in turn. In a saved folder each entry file therefore names all
other files, under TYPE_CHECKING, which transformers reads like any other line.
"""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

AUTO_MAP = {
    "AutoConfig": "configuration_lrnn.LrnnConfig",
    "AutoModel": "modeling_lrnn.LrnnModel",
    "AutoModelForCausalLM": "modeling_lrnn.LrnnForCausalLM",
    # `transformers serve` (5.22 and later) asks this class first, and then only for classes of transformers itself.
    # The pipeline of that name takes any causal language model.
    "AutoModelForDecision": "modeling_lrnn.LrnnForCausalLM",
}
ENTRY_FILES = ("configuration_lrnn.py", "modeling_lrnn.py")
HERE = Path(__file__).parent


def code_files() -> dict[str, str]:
    """Return the code of a saved model, text by file name: the whole model with all mixers."""
    if __package__ != "lrnn.model":  # the code of a saved folder, which is complete
        entry = HERE / ENTRY_FILES[1]
        return {
            file.name: file.read_text(encoding="utf-8")
            for file in {entry, *map(Path, get_relative_import_files(entry))}
        }
    files = [file for folder in (HERE, HERE.parent / "kernels/reference") for file in sorted(folder.glob("*.py"))]
    code = {file.name: file.read_text(encoding="utf-8") for file in files if file.name != "__init__.py"}
    code["mixers.py"] = _mixers_file()
    for entry_file in ENTRY_FILES:
        code[entry_file] += _names_of(code.keys() - {entry_file})
    return code


def write_code(folder: Path) -> None:
    """Write the code of a saved model into its folder."""
    for name, text in code_files().items():
        (folder / name).write_text(text, encoding="utf-8")


def _mixers_file() -> str:
    """Return a `mixers.py` that imports every mixer by its name.

    transformers copies only the files that such lines name; it does not see what the package's `mixers.py` imports.
    """
    from .mixers import MIXERS  # here, because the mixers import the configuration, which imports this file

    classes: dict[str, set[str]] = {}
    for mixer in MIXERS.values():
        classes.setdefault(mixer.__module__.rpartition(".")[2], set()).add(mixer.__name__)
    lines = [f"from .{module} import {', '.join(sorted(names))}" for module, names in sorted(classes.items())]
    title = "Every mixer of this folder, imported so that it registers itself. Written by lrnn."
    return "\n".join([f'"""{title}"""', "", *lines, "from .registry import MIXERS", ""])


def _names_of(files: set[str]) -> str:
    """Return lines that name files as an import would, to be added to an entry file."""
    lines = [f"    from .{file.removesuffix('.py')} import *" for file in sorted(files)]
    comment = "# Nothing is imported here: transformers before 5.10 copies only the files that this one names."
    return "\n".join(
        ["", "", comment, "from typing import TYPE_CHECKING  # noqa: E402", "", "if TYPE_CHECKING:", *lines, ""]
    )
