"""Muon (arXiv 2502.16982) for the matrices of a model, under ZeRO.

    M = mu M + (1 - mu) G        W = W - lr (ratio orthogonalize((1 - mu) G + mu M) + decay W)

The momentum M is kept as ZeRO keeps Adam's moments: flat, and each rank has a slice. Orthogonalizing needs whole
matrices, so those that a slice cuts are put together on one rank, which sends back what belongs to the others.

matrices        which weights of a model are matrices, and where several are in one weight
newton_schulz   the orthogonalization, of many matrices at a time
sharing         which rank computes which weight, and the exchange of pieces
optimizer       the step
"""
