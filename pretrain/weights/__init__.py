"""Fresh weights: the values that PyTorch draws one after the other, drawn by several threads and only where they stay.

`lazy_fills` postpones every random fill while a model is built, so that a fill that another one overwrites is never
computed. `jump` gives the state of the random numbers at each fill that is left, so that threads can share them.
"""
