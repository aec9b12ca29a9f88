"""What the tests of runs on a GPU share: the sizes of their model, there and in a rehearsal on a CPU, and processes."""

import multiprocessing
from functools import partial

import pytest
import torch
import training_group

ON_GPU = torch.cuda.is_available()
GPUS = torch.cuda.device_count() if ON_GPU else 2  # processes of a rehearsal
VOCABULARY = 4096 if ON_GPU else 400
MODEL = {"model_type": "lrnn", "vocab_size": VOCABULARY, "hidden_size": 512, "num_hidden_layers": 4, "num_heads": 4}
MODEL |= {"head_dim": 128, "intermediate_size": 1024}
if not ON_GPU:
    MODEL |= {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "intermediate_size": 48}
needs_two_gpus = pytest.param(2, marks=pytest.mark.skipif(GPUS < 2, reason="needs two GPUs"))

run_group = partial(training_group.run_group, context=multiprocessing.get_context("spawn"))
