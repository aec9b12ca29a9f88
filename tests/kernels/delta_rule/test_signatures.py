"""Test that public functions, reference and operators take the same arguments, with equal names and order."""

import inspect

import delta_rule_inputs as inputs
import pytest
import torch
from delta_rule_truth import relative_error

from lrnn.kernels.delta_rule import api, operator
from lrnn.kernels.reference import delta_rule as reference

FUNCTIONS = ["gated_delta_rule", "fused_gated_delta_rule", "gated_delta_product", "fused_gated_delta_product"]
# The raw names of a fused call, and the names of its tensors where they may be raw or not.
GATE_AND_STEP = {"g": "gate", "a": "gate", "b": "beta"}


def parameters(function, *without):
    return {name: p for name, p in inspect.signature(function).parameters.items() if name not in without}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_reference_takes_the_arguments_of_the_public_function(name):
    public = parameters(getattr(api, name), "save_states")  # the reference saves nothing
    assert list(public.values()) == list(parameters(getattr(reference, name), "chunk_size").values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_given_by_name(name):
    kinds = [p.kind for p in parameters(getattr(api, name)).values()]
    tensors = 7 if name.startswith("fused") else 5
    assert kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * tensors + [inspect.Parameter.KEYWORD_ONLY] * (
        len(kinds) - tensors
    )


def test_operators_take_them_in_the_same_order():
    names = [GATE_AND_STEP.get(name, name) for name in parameters(api.fused_gated_delta_rule)]
    names.insert(names.index("scale") + 1, "normalize_qk")  # the fused call always normalises
    forward = [argument.name for argument in operator.gated_delta_rule_forward._schema.arguments]
    assert forward == names
    for other in (operator.gated_delta_rule_backward, operator.gated_delta_rule_recurrent):
        taken = [argument.name for argument in other._schema.arguments]
        assert [name for name in taken if name in names] == [name for name in names if name in taken]


@pytest.mark.parametrize("module", [api, reference])
@pytest.mark.parametrize("beta_range", [0.0, -1.0, 2.5, float("nan")])
def test_invalid_ranges_are_refused(module, beta_range):
    x = inputs.random(1, 5, raw=True)
    with pytest.raises(ValueError, match=rf"beta_range must be in \(0, 2\], or None .*; got {beta_range}"):
        module.fused_gated_delta_rule(**x, beta_range=beta_range)


@pytest.mark.parametrize("module", [api, reference])
def test_step_sizes_can_be_given_directly(module):
    x = inputs.random(1, 70, raw=True)
    expected, _ = module.fused_gated_delta_rule(**x, beta_range=1.5)
    found, _ = module.fused_gated_delta_rule(**x | {"b": 1.5 * torch.sigmoid(x["b"])}, beta_range=None)
    assert relative_error(found, expected) < 1e-6
