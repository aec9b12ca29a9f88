"""Compare on a GPU the reference with a float64 recurrence, and the model's logits with those of fla's model."""

import pytest
import torch
import torch.nn.functional as F

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.formats.fla import to_fla_config
from lrnn.kernels.delta_rule import operator as delta_rule_op
from lrnn.kernels.reference.delta_rule import gated_delta_rule
from lrnn.pretrain.engine import build_model

SIZES = {"vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 3, "head_dim": 128, "num_heads": 2}


def error(x, truth):
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


def float64_recurrence(q, k, v, g, beta):
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    S = q.new_zeros(*q.shape[:1], q.shape[2], q.shape[3], v.shape[3])
    out = []
    for t in range(q.shape[1]):
        S = S * g[:, t].exp()[..., None, None]
        S = S - beta[:, t, :, None, None] * k[:, t, :, :, None] * (k[:, t, :, None] @ S)
        S = S + beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        out.append((S.mT @ q[:, t, :, :, None])[..., 0] / q.shape[3] ** 0.5)
    return torch.stack(out, 1)


@pytest.mark.parametrize("T", [1, 63, 64, 1000])
def test_reference_matches_float64(T):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, 2, 128, device="cuda") for _ in range(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    g, beta = -0.2 * torch.rand(2, T, 2, device="cuda"), 2 * torch.rand(2, T, 2, device="cuda")
    o, _ = gated_delta_rule(q, k, v, g, beta)
    assert error(o, float64_recurrence(q, k, v, g, beta)) < 1e-5


def pair_of_models(mixer: str, negative: bool, attn_mode: str):
    """Return our model and fla's with the same float32 weights. `attn_mode` is fla's method for more than 64 tokens."""
    import fla.models  # noqa: F401, registers the models
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = LrnnConfig(**SIZES, intermediate_size=512, mixer=mixer, allow_neg_eigval=negative)
    ours = LrnnForCausalLM(config).cuda().eval()
    with torch.no_grad():  # larger weights than at initialisation, so that the states matter
        for name, parameter in ours.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                parameter.mul_(3)
    fields = to_fla_config(config) | {"attn_mode": attn_mode}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).cuda().eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@torch.no_grad()
def logits(model, T: int, autocast: bool = False):
    ids = torch.randint(0, 500, (2, T), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("T", [50, 700])
@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("mixer", ["gated_deltanet", "deltanet"])
def test_logits_match_fla_in_float32(mixer, negative, T):
    """Use fla's recurrence, since its chunked delta rule refuses float32."""
    ours, theirs = pair_of_models(mixer, negative, attn_mode="fused_recurrent")
    found = error(logits(theirs, T), logits(ours, T))
    print(f"{mixer}, negative {negative}, T {T}: relative difference of the logits {found:.1e}")
    assert found < 1e-4


@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("mixer", ["gated_deltanet", "deltanet"])
def test_logits_match_flas_chunked_kernels_in_bf16(mixer, negative):
    """Compare both under autocast with our logits in float32."""
    ours, theirs = pair_of_models(mixer, negative, attn_mode="chunk")
    truth = logits(ours, 700)
    found, own = (error(logits(model, 700, autocast=True), truth) for model in (theirs, ours))
    print(f"{mixer}, negative {negative}: relative error of the logits in bf16 {found:.1e}, our own {own:.1e}")
    assert found < 0.1  # with the other range of eigenvalues it would be above 0.4
    assert own < 0.1


def test_generation_on_the_gpu_equals_the_whole_pass():
    torch.manual_seed(0)
    model = LrnnForCausalLM(LrnnConfig(**SIZES, intermediate_size=512)).cuda().eval()
    prompt = torch.randint(3, 500, (2, 70), device="cuda")
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **options))


@pytest.mark.parametrize("T", [500, 512])
def test_recomputed_layers_give_the_same_gradients(T, monkeypatch):
    """Layers save their states for the backward pass when they are recomputed, and not the first time.

    T = 512 runs in Gluon, T = 500 in plain Triton. Both kernels give the same bits with and without saved states.
    """
    saved = []
    forward = delta_rule_op._forward_results
    monkeypatch.setattr(delta_rule_op, "_forward_results", lambda *a: saved.append(a[-1]) or forward(*a))
    config = LrnnConfig(**SIZES, intermediate_size=512)
    ids = torch.randint(0, 500, (2, T), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    gradients = []
    for recompute in (False, True):
        model = build_model(config, 0, recompute).cuda().train()
        with torch.autocast("cuda", torch.bfloat16):
            model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    layers = SIZES["num_hidden_layers"]
    assert saved == [False] * 2 * layers + [True] * layers
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])
