"""The gated delta rule: kernels for training and generation.

A call enters by `api`, which checks and pads it, and reaches the operators of `operator` by position. These describe it
as a `Call` (`call`; its chunks and segments in `cut`), allocate, and launch. The backend that `backends` chooses
computes the matrices of the chunks, scans the chunks forward and, for gradients, backward, and computes the gradients
inside chunks. `segments` scans few long sequences in parts, side by side.

`portable/` is plain Triton for every GPU, `hopper/` Gluon for Hopper. Each launcher is in the file of its kernel.
`compile_cases` in each lists the kernels as training uses them, to be compiled without a GPU.
"""
