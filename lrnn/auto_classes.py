"""Register the model with transformers' Auto classes when these are imported, and not before.

`import lrnn` must register the model, so that transformers loads an exported folder with lrnn's classes instead of the
code beside its weights. But transformers and torch take seconds to import, which `lrnn --help` should not wait for. So
lrnn watches the import of the two modules that define the Auto classes, and of its own two that define the classes to
register. When one of a pair has been imported, lrnn imports the other one and registers.

Some modules of transformers that the model needs import the Auto classes themselves, such as `modeling_layers`. While
one of them is being imported, the model cannot be. They are watched too, and lrnn registers when they are complete.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_CONFIG, AUTO_MODEL = "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"
CONFIG, MODEL = "lrnn.model.configuration_lrnn", "lrnn.model.modeling_lrnn"
PAIRS = ((AUTO_CONFIG, CONFIG), (AUTO_MODEL, MODEL))
NEEDED = tuple(  # what the model imports from transformers
    f"transformers.{name}"
    for name in ("cache_utils", "generation.utils", "modeling_layers", "modeling_outputs", "modeling_utils")
)
WATCHED = frozenset((AUTO_CONFIG, CONFIG, AUTO_MODEL, MODEL, *NEEDED))


class _Watcher(MetaPathFinder):
    """Find the watched modules as usual, and call `_register` when they have been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _executed.add(name)
                _register()

            loader.exec_module = execute_and_register
        return spec


_executed: set[str] = set()  # watched modules that have been executed completely


def install() -> None:
    """Watch imports from now on; register at once if the Auto classes are already imported."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
        _executed.update(WATCHED & sys.modules.keys())
        _register()


def _register() -> None:
    """Register each pair whose transformers module is complete, unless lrnn's cannot be imported at the moment."""
    for auto, ours in PAIRS:
        needed = (ours,) if auto == AUTO_CONFIG else (ours, *NEEDED)
        if auto not in _executed or any(name in sys.modules and name not in _executed for name in needed):
            continue  # not needed yet; or something is being imported, and comes back here when it is done
        module = importlib.import_module(ours)
        if auto == AUTO_CONFIG:
            sys.modules[auto].AutoConfig.register(module.LrnnConfig.model_type, module.LrnnConfig, exist_ok=True)
        else:
            config = module.LrnnConfig
            sys.modules[auto].AutoModel.register(config, module.LrnnModel, exist_ok=True)
            sys.modules[auto].AutoModelForCausalLM.register(config, module.LrnnForCausalLM, exist_ok=True)
