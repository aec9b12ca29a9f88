"""The whole model on the kernels, in float32, beside the same model in plain PyTorch."""

import pytest
import torch

from lrnn import LrnnConfig, LrnnForCausalLM, layers_lrnn, mixer_deltanet
from lrnn.kernels import delta_rule_reference

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 64}


@pytest.fixture
def in_pytorch(monkeypatch):
    """A function after which models run in plain PyTorch."""

    def switch():
        monkeypatch.setattr(layers_lrnn, "use_kernels", lambda x: False)
        monkeypatch.setattr(mixer_deltanet, "fused_gated_delta_rule", delta_rule_reference.fused_gated_delta_rule)
        monkeypatch.setattr(mixer_deltanet, "gated_delta_product", delta_rule_reference.gated_delta_product)

    return switch


def make_model(mixer: str, **changes) -> LrnnForCausalLM:
    torch.manual_seed(0)
    model = LrnnForCausalLM(LrnnConfig(**SIZES | changes, intermediate_size=48, mixer=mixer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


def losses_and_gradients(model: LrnnForCausalLM, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    out.loss.backward()
    return {"logits": out.logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("mixer", "kind"),
    [
        ("gated_deltanet", "documents"),
        ("gated_deltanet", "padded"),
        ("deltanet", "plain"),
        ("gated_deltanet", "small heads and no convolution"),
        ("gated_deltaproduct", "documents"),
        ("gated_deltaproduct", "padded"),
        ("mamba2", "padded"),  # of the other mixers the convolutions and the norm run on kernels
        ("mlstm", "documents"),
    ],
)
def test_logits_and_gradients(mixer, kind, in_pytorch):
    model = make_model(mixer, **({"head_dim": 32, "conv_size": 1} if kind.startswith("small") else {}))
    inputs = {"input_ids": torch.randint(50, (2, 70), generator=torch.Generator().manual_seed(1))}
    if kind == "documents":
        inputs["cu_seqlens"] = torch.tensor([0, 30, 30, 70, 71, 140])
    if kind == "padded":
        inputs["attention_mask"] = torch.ones(2, 70, dtype=torch.int64)
        inputs["attention_mask"][1, :20] = 0
    ours = losses_and_gradients(model, **inputs)
    in_pytorch()
    plain = losses_and_gradients(model, **inputs)
    if kind == "padded":  # what stands at padding is nobody's
        ours["logits"], plain["logits"] = ours["logits"][:, 20:], plain["logits"][:, 20:]
    for name, truth in plain.items():
        assert (ours[name] - truth).norm() <= 1e-4 * truth.norm(), name


def test_generation(in_pytorch):
    model = make_model("gated_deltanet").eval()
    prompt = torch.randint(3, 50, (2, 20), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    ours = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    in_pytorch()
    assert torch.equal(ours, model.generate(prompt, attention_mask=torch.ones_like(prompt), **options))
