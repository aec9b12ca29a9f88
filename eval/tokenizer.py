"""The export of tokenizers, under its module's name in lrnn 0.1.0. Deprecated: use `lrnn.eval.export.tokenizer`."""

import warnings

from lrnn.eval.export.tokenizer import export_tokenizer as export_tokenizer

warnings.warn("lrnn.eval.tokenizer is now lrnn.eval.export.tokenizer", DeprecationWarning, stacklevel=2)
