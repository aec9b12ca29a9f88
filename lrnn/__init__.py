"""lrnn: pretrain linear RNNs that can track state.

Importing the package takes no time: its classes are imported when they are first used. From then on, or as soon as
transformers' Auto classes are imported, `AutoModelForCausalLM.from_pretrained` loads an exported folder with this code.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lrnn import auto_classes

if TYPE_CHECKING:
    from lrnn.model.configuration_lrnn import LrnnConfig
    from lrnn.model.modeling_lrnn import LrnnForCausalLM, LrnnModel

__all__ = ["LrnnConfig", "LrnnForCausalLM", "LrnnModel"]
__version__ = "0.1.0"

_MODULES = {
    "LrnnConfig": "lrnn.model.configuration_lrnn",
    "LrnnModel": "lrnn.model.modeling_lrnn",
    "LrnnForCausalLM": "lrnn.model.modeling_lrnn",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_MODULES[name]), name)
    return value


auto_classes.install()
