"""Test processes that use parts of `lrnn` which need no models.

`import lrnn` registers its models with transformers, whose import takes seconds.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

# The environment of a process that imports this file.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}


def leave_models_out() -> None:
    """Make `lrnn` a package that finds its modules and imports nothing itself."""
    spec = importlib.util.find_spec("lrnn")
    assert spec is not None and "lrnn" not in sys.modules
    sys.modules["lrnn"] = types.ModuleType("lrnn")
    sys.modules["lrnn"].__path__ = list(spec.submodule_search_locations or [])
