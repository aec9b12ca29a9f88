"""The tokenizers, under their module's name in lrnn 0.1.0. Deprecated: import them from `lrnn.tokenizer`."""

import warnings

from lrnn.tokenizer import load_tokenizer as load_tokenizer

warnings.warn("lrnn.pretrain.tokenizers_io is now lrnn.tokenizer", DeprecationWarning, stacklevel=2)
