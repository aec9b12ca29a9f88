"""What kernels of several rooms share; nothing here knows an algorithm.

`dispatch` decides whether a tensor is computed by kernels at all. `launch` launches a compiled kernel at little cost to
the host, with `tiles` for the matrices that the TMA loads and stores. `constants` and `dtypes` hold the numbers and the
choices that kernels, launchers and tests agree on. `assembler` warns about a ptxas that miscompiles.
"""
