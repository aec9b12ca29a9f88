"""The kernels in Gluon for Hopper, with heads of 128 in 16 bits and full chunks.

Each file is the Hopper form of the file of the same name in `portable/`: the same equations and roundings, computed by
warps that each do a part of the work. `backend` says which calls they are made for, `parts` holds what they share.
"""
