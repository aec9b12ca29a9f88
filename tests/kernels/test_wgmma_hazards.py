"""Test `find_hazards` on PTX written for it."""

import pytest
from wgmma_hazards import find_hazards

PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%c0,%c1}, {%a0,%a1,%a2,%a3}, %rd1, %p1, 1, 1, 1;"
OTHER = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0,%d1}, %rd2, %rd1, %p1, 1, 1, 0, 0;"
COMMIT = "wgmma.commit_group.sync.aligned;"


def wait(pending):
    return f"wgmma.wait_group.sync.aligned {pending};"


def loop(*body):
    return "\n".join(["mov.b32 %i, 0;", "$L1:", *body, "@%p2 bra $L1;", wait(0), "st.global.b32 [%rd3], %c0;", "ret;"])


WRITE = "cvt.rn.bf16x2.f32 %a2, %f1, %f2;"


@pytest.mark.parametrize(
    ("ptx", "registers"),
    [
        (loop(WRITE, PRODUCT, COMMIT, wait(0)), []),
        (
            loop(WRITE, PRODUCT, COMMIT, wait(1)),
            ["%a2"],
        ),  # the next iteration writes a register that the product may still read
        (loop(wait(0), WRITE, PRODUCT, COMMIT), []),
        (loop(WRITE, PRODUCT, COMMIT, wait(1), OTHER, COMMIT, wait(1)), []),  # the second group pushes the first out
        (loop(OTHER, COMMIT, WRITE, PRODUCT, COMMIT, wait(1)), ["%a2"]),
        (loop(PRODUCT, COMMIT, WRITE, wait(0)), ["%a2"]),
        (loop(PRODUCT, "add.f32 %f1, %a2, %f1;", COMMIT, wait(0)), []),  # an operand may be read
        (loop(PRODUCT, COMMIT, "add.f32 %f1, %c1, %f1;", wait(0)), ["%c1"]),  # an accumulator may not
        (loop(PRODUCT, COMMIT, "st.shared.v2.b32 [%r1], {%a0, %a1};", wait(0)), []),
        (loop(PRODUCT, COMMIT, "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%f1, %a0}, [%r1];", wait(0)), ["%a0"]),
        (loop(PRODUCT, COMMIT, "@%p3 bra $L2;", wait(0), "$L2:", WRITE), ["%a2"]),  # one path has no wait
        (loop(PRODUCT, COMMIT, "@%p3 mov.b32 %a3, %r1;", wait(0)), ["%a3"]),
    ],
)
def test_registers_used_too_early_are_found(ptx, registers):
    assert sorted({hazard.split("[")[-1].rstrip("]") for hazard in find_hazards(ptx)}) == registers


def test_an_unknown_form_of_product_is_an_error():
    with pytest.raises(ValueError, match=r"not understood: wgmma\.mma_async"):
        find_hazards(loop(PRODUCT.replace("{%c0,%c1}", "%c0"), COMMIT, wait(0)))
