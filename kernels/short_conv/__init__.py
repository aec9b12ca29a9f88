"""Causal depthwise convolution of a few taps, then SiLU, of up to three tensors in one launch.

What flows through the room:

    api.py            checks the inputs, and sends them to the operator or, on the CPU, to the plain reference
    operator.py       the PyTorch operators of both passes and their gradient
    launch.py         launches a kernel: block sizes, which inputs are read in place
    kernels.py        the Triton kernels, with the equations
    compile_cases.py  the kernels as training compiles them, for tests without a GPU
"""
