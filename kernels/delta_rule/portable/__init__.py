"""The kernels in plain Triton, for every GPU, head size and dtype: the readable form of each.

`chunk_inverse` couples the tokens of a chunk, `chunk_forward` and `scan_backward` scan the chunks, `chunk_backward`
computes the gradients inside them, and `backend` offers these four as a backend. Every backend uses the others:
`segment_reach` and `segment_scan` for segments, `gate_backward` for the gradients of gates and step sizes, `recurrent`
for generation. `parts` holds what kernels share.
"""
