"""Greedy generation at the speed of the memory: one launch for several tokens, and a state that stays in its place.

decoding.py      `GraphDecoding`, which `generate(custom_generate=...)` of transformers takes
steps.py         several decoding steps on fixed tensors, recorded as one CUDA graph
prefill.py       the prompt, in pieces of bounded memory
stop_strings.py  the end of a text at a stop string, looked for every few tokens
batch_size.py    how many sequences fit into the memory of the GPU
"""
