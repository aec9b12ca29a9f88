"""Test that a process of the tests computes with one thread, whatever ran before it (see tests/conftest.py)."""

import os

import torch


def test_one_thread():
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"  # for the processes that tests start
