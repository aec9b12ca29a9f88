"""Register the model with transformers' Auto classes when these are imported, and not before.

`import lrnn` must register the model, so that transformers loads an exported folder with lrnn's classes instead of the
code beside its weights. But transformers and torch take seconds to import, which `lrnn --help` should not wait for. So
lrnn watches the import of the two modules that define the Auto classes, and of its own two that define the classes to
register. When one of a pair has been imported, lrnn imports the other one and registers.
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


class _Watcher(MetaPathFinder):
    """Find the watched modules as usual, and call `_register` when they have been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not any(name in pair for pair in PAIRS):
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
        _executed.update(name for pair in PAIRS for name in pair if name in sys.modules)
        _register()


def _register() -> None:
    """Register each pair whose transformers module is complete, unless lrnn's is being imported at the moment."""
    for auto, ours in PAIRS:
        if auto not in _executed or (ours in sys.modules and ours not in _executed):
            continue  # not needed yet; or it is being imported, and comes back here when it is done
        module = importlib.import_module(ours)
        if auto == AUTO_CONFIG:
            sys.modules[auto].AutoConfig.register(module.LrnnConfig.model_type, module.LrnnConfig, exist_ok=True)
        else:
            config = module.LrnnConfig
            sys.modules[auto].AutoModel.register(config, module.LrnnModel, exist_ok=True)
            sys.modules[auto].AutoModelForCausalLM.register(config, module.LrnnForCausalLM, exist_ok=True)
