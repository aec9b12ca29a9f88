"""The public functions, the reference and the operators take the same arguments by the same names in one order."""

import inspect

import delta_rule_inputs as inputs
import pytest
import torch
from delta_rule_truth import relative_error

from lrnn.kernels.delta_rule import api, operator
from lrnn.kernels.reference import delta_rule as reference

FUNCTIONS = ["gated_delta_rule", "fused_gated_delta_rule", "gated_delta_product"]
# The raw names of a fused call, and what its tensors are called where they may be either.
GATE_AND_STEP = {"g": "gate", "a": "gate", "b": "beta"}


def parameters(function, *without):
    return {name: p for name, p in inspect.signature(function).parameters.items() if name not in without}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_reference_takes_what_the_public_function_takes(name):
    public = parameters(getattr(api, name), "save_states")  # nothing is saved there
    assert list(public.values()) == list(parameters(getattr(reference, name), "chunk_size").values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_given_by_name(name):
    kinds = [p.kind for p in parameters(getattr(api, name)).values()]
    tensors = 7 if name == "fused_gated_delta_rule" else 5
    assert kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * tensors + [inspect.Parameter.KEYWORD_ONLY] * (
        len(kinds) - tensors
    )


def test_operators_take_them_in_the_same_order():
    names = [GATE_AND_STEP.get(name, name) for name in parameters(api.fused_gated_delta_rule)]
    names.insert(names.index("scale") + 1, "normalize_qk")  # always done by the fused call
    forward = [argument.name for argument in operator.gated_delta_rule_forward._schema.arguments]
    assert forward == names
    for other in (operator.gated_delta_rule_backward, operator.gated_delta_rule_recurrent):
        taken = [argument.name for argument in other._schema.arguments]
        assert [name for name in taken if name in names] == [name for name in names if name in taken]


@pytest.mark.parametrize("module", [api, reference])
@pytest.mark.parametrize("beta_range", [0.0, -1.0, 2.5, float("nan")])
def test_ranges_that_are_refused(module, beta_range):
    x = inputs.random(1, 5, raw=True)
    with pytest.raises(ValueError, match=rf"beta_range must be in \(0, 2\], or None .*; got {beta_range}"):
        module.fused_gated_delta_rule(**x, beta_range=beta_range)


@pytest.mark.parametrize("module", [api, reference])
def test_step_sizes_as_they_are(module):
    x = inputs.random(1, 70, raw=True)
    expected, _ = module.fused_gated_delta_rule(**x, beta_range=1.5)
    found, _ = module.fused_gated_delta_rule(**x | {"b": 1.5 * torch.sigmoid(x["b"])}, beta_range=None)
    assert relative_error(found, expected) < 1e-6
