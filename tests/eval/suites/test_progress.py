"""Test that the evaluation of whole documents shows how much is left."""

from types import SimpleNamespace

import pytest


def test_one_bar_counts_the_tokens_of_all_documents(tiny_model, monkeypatch, capsys):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from lrnn.eval.suites import model as module

    bars = []

    class Bar(module.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.parts = []
            bars.append(self)

        def update(self, n=1):
            self.parts.append(n)
            return super().update(n)

    monkeypatch.setattr(module, "tqdm", Bar)
    options = {"device": "cpu", "batch_size": 2, "max_length": 16, "dtype": "float32"}
    lm = module.Model(pretrained=str(tiny_model), **options)
    texts = ["def f(x):\n    return x\n" * 9, "[1, 2]", "naïve\n" * 30]
    requests = [SimpleNamespace(args=(text,)) for text in texts]
    capsys.readouterr()
    found = lm.loglikelihood_rolling(requests)
    (bar,) = bars
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert bar.total == bar.n == sum(bar.parts) == sum(lengths) and len(bar.parts) > 3
    assert "Running loglikelihood requests" not in capsys.readouterr().err
    assert found == pytest.approx(HFLM.loglikelihood_rolling(lm, requests), rel=1e-6)
    assert "Running loglikelihood requests" in capsys.readouterr().err, "other tasks keep lm-eval's bars"
