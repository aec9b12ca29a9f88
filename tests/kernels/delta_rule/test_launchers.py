"""Test that the launchers of each backend pass every argument of a kernel to the parameter of that name."""

import pytest
import torch
from delta_rule_calls import BackendCall, replace_launch

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.tiles import Tiles
from lrnn.kernels.delta_rule.backends import BACKENDS
from lrnn.kernels.delta_rule.hopper.backend import Hopper

B, T, H, HV, D = 2, 128, 1, 2, 128


@pytest.fixture
def launched(monkeypatch):
    calls = []
    replace_launch(monkeypatch, lambda *args, **constants: calls.append((args, constants)))
    return calls


def arguments(call):
    """Return the arguments of a launch by the kernel's parameter names, and its constants."""
    (kernel, grid, *args), constants = call
    assert all(size > 0 for size in grid)
    names = kernel.arg_names
    given = set(names[: len(args)]) | constants.keys()
    assert given - set(names) <= {"num_warps", "num_stages"} and given >= set(names)
    assert not set(names[: len(args)]) & constants.keys()
    return dict(zip(names, args, strict=False)), constants


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_argument_has_its_place(backend, launched):
    hopper = backend is Hopper
    q, k = (torch.zeros(B, T, H, D, dtype=torch.bfloat16) for _ in range(2))
    v, o, do = (torch.zeros(B, T, HV, D, dtype=torch.bfloat16) for _ in range(3))
    y, dv = torch.zeros(B * T, HV * D, dtype=torch.bfloat16), torch.zeros(B, T, HV, D, dtype=torch.bfloat16)
    c, vectors = torch.zeros(B * T, HV * CHUNK, dtype=torch.float16), torch.zeros(4 * HV, B * T)
    states, dstates = (torch.zeros(B * T // CHUNK * HV * D, D, dtype=torch.bfloat16) for _ in range(2))
    initial, final, dfinal, dinitial = (torch.zeros(B, HV, D, D) for _ in range(4))
    scan = BackendCall(backend, q, k, v, c, vectors, scale=0.5, normalize_qk=True, split=True)
    scan.forward_scan(initial, final, o=o)
    scan.forward_scan(None, None, y=y, states=states)
    scan.forward_scan(None, None, o=o, y=y, states=states)
    scan.backward_scan(do, dfinal, dinitial, dv, dstates)
    output, recomputed, saving, backward = (arguments(call) for call in launched)

    kernels = {call[0][0].__name__ for call in launched}
    assert kernels == {name.replace("_kernel", "_hopper_kernel" if hopper else "_kernel") for name in
                       ("chunk_forward_kernel", "chunk_scan_backward_kernel")}  # fmt: skip
    # tiles keep the tensor that they belong to
    of = {"q": q, "k": k, "c": c, "vector_rows": vectors}
    for (args, constants), more in (
        (output, {"v": v, "o": o}),
        (recomputed, {"v": v, "y": y, "states": states}),
        (saving, {"v": v, "o": o, "y": y, "states": states}),
        (backward, {"do": do, "dv": dv, "dstates": dstates}),
    ):
        for name, tensor in (of | more).items():
            assert args[name] is None if name == "q" and args is recomputed[0] else args[name].base is tensor
        assert args["vectors"] is vectors
        assert (args["T"], args["R"], args["scale"]) == (T, B * T, 0.5)
        assert [constants[n] for n in ("H", "HV", "K", "V", "BT", "SPLIT")] == [H, HV, D, D, CHUNK, True]
    assert output[0]["initial_state"] is initial and output[0]["final_state"] is final
    assert backward[0]["dfinal"] is dfinal and backward[0]["dinitial"] is dinitial
    assert output[1]["OUTPUT"] and not output[1]["SAVE_STATES"] and output[1]["HAS_INITIAL"] and output[1]["SAVE_FINAL"]
    assert recomputed[1]["SAVE_STATES"] and not recomputed[1]["OUTPUT"] and not recomputed[1]["HAS_INITIAL"]
    assert saving[1]["OUTPUT"] and saving[1]["SAVE_STATES"]
    # Gluon stores a whole state at once, plain Triton in halves.
    assert backward[0]["dstates"].block_shape == [64, D if hopper else D // 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_argument_inside_chunks_has_its_place(backend, launched):
    hopper = backend is Hopper
    q, k = (torch.zeros(B, T, H, D, dtype=torch.bfloat16) for _ in range(2))
    v, do, dq, dk, dv = (torch.zeros(B, T, HV, D, dtype=torch.bfloat16) for _ in range(5))
    y = torch.zeros(B * T, HV * D, dtype=torch.bfloat16)
    c, vectors = torch.zeros(B * T, HV * CHUNK, dtype=torch.float16), torch.zeros(4 * HV, B * T)
    states, dstates = (torch.zeros(B * T // CHUNK * HV * D, D, dtype=torch.bfloat16) for _ in range(2))
    numbers = {name: torch.zeros(HV, B * T) for name in ("dbeta", "dot_q", "dot_k")}
    scan = BackendCall(backend, q, k, v, c, vectors, scale=0.5, normalize_qk=True)
    results = {"dq": dq, "dk": dk}
    given = {"do": do, "y": y, "states": states, "dstates": dstates}
    scan.chunk_backward(**given, dv=dv, **results, **numbers)
    args, constants = arguments(launched[0])

    assert launched[0][0][0].__name__ == ("chunk_backward_hopper_kernel" if hopper else "chunk_backward_kernel")
    for name, tensor in (given | {"q": q, "k": k, "dx": dv}).items():
        assert args[name].base is tensor
    for name, tensor in results.items():
        assert (args[name].base if hopper else args[name]) is tensor
    assert all(args[name] is tensor for name, tensor in (numbers | {"dv": dv}).items())
    assert (args["R"], args["scale"], constants["NORMALIZE"]) == (B * T, 0.5, True)
    assert [constants[n] for n in ("H", "HV", "K", "V", "BT")] == [H, HV, D, D, CHUNK]
    if hopper:
        assert args["vector_rows"].base is vectors and args["chunks"] == B * T // CHUNK
        tiles = [x.block_shape for x in args.values() if isinstance(x, Tiles) and x.base is not vectors]
        assert len(tiles) == 9 and all(shape == [CHUNK, D] for shape in tiles)
        assert launched[0][0][1] == (B * T // CHUNK * HV, 1, 1)  # fewer than there are multiprocessors
    else:
        assert args["vectors"] is vectors and args["T"] == T


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_argument_of_the_matrices_has_its_place(backend, launched):
    hopper = backend is Hopper
    q, k = (torch.zeros(B, T, H, D, dtype=torch.bfloat16) for _ in range(2))
    v = torch.zeros(B, T, HV, D, dtype=torch.bfloat16)
    gate, beta = (torch.zeros(B, T, HV, dtype=torch.bfloat16) for _ in range(2))
    A_log, dt_bias = torch.zeros(HV), torch.zeros(HV)
    c, vectors = torch.zeros(B * T, HV * CHUNK, dtype=torch.float16), torch.zeros(4 * HV, B * T)
    options = {"scale": 0.5, "normalize_qk": True, "gate": "raw", "beta_range": 2.0}
    BackendCall(backend, q, k, v, c, vectors, **options).chunk_inverse(gate, beta, A_log, dt_bias)
    args, constants = arguments(launched[0])

    assert launched[0][0][0].__name__ == ("chunk_inverse_hopper_kernel" if hopper else "chunk_inverse_kernel")
    given = {"gate": gate, "beta": beta, "A_log": A_log, "dt_bias": dt_bias, "vectors": vectors}
    assert all(args[name] is tensor for name, tensor in given.items())
    assert (args["k"].base if hopper else args["k"]) is k and (args["c_out"].base if hopper else args["c_out"]) is c
    assert (args["R"], args["beta_range"], constants["GATE"], constants["RAW_BETA"]) == (B * T, 2.0, "raw", True)
    assert [constants[n] for n in ("H", "HV", "K", "BT", "NORMALIZE", "num_warps")] == [H, HV, D, CHUNK, True, 1]
    if hopper:
        assert args["k"].block_shape == [CHUNK, D] and args["c_out"].block_shape == [CHUNK, CHUNK]
        assert launched[0][0][1] == (B * T // CHUNK * HV, 1, 1)
    else:
        assert launched[0][0][1] == (B * T // CHUNK, HV, 1) and args["stride_k"] == H * D and args["T"] == T
