"""Layers that compute their own backward pass, which training on GPUs uses in place of the model's plain ones.

The plain form is in `lrnn.model`. Both compute the same up to rounding.

choice          whether a run trains with them
layers          put them into a model
deltanet        x + mixer(norm(x)) for DeltaNet and DeltaProduct, gated or not
mlp             x + mlp(norm(x))
loss            the head and the cross-entropy
product         products with the weights of several linear layers
float8          the same in float8, for `precision: fp8`
"""
