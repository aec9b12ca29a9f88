"""Every mixer beside this file, imported so that it registers itself.

In an exported folder a generated file takes its place, with one import per mixer file, because transformers copies only
the files that such lines name.
"""

import importlib
from pathlib import Path

from .registry import MIXERS

__all__ = ["MIXERS"]

for _file in sorted(Path(__file__).parent.glob("mixer_*.py")):
    importlib.import_module(f".{_file.stem}", __package__)

# Their order is that of the files, whichever of them was imported first.
_in_order = sorted(MIXERS.items(), key=lambda item: item[1].__module__)
MIXERS.clear()
MIXERS.update(_in_order)
