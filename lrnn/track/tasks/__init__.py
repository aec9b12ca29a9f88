"""The state-tracking tasks of arXiv 2411.12537 and DeltaProduct (arXiv 2502.10297), generated on the device.

    registry.py            a task by its name in a grid
    base.py                the interface, and the layout shared by tasks with one answer per sequence
    counter_rng.py         random integers as a pure function of seed, sample index, field and counter
    formal_languages.py    parity, even pairs, cycle navigation, arithmetic without brackets
    bracket_arithmetic.py  arithmetic with brackets
    group_words.py         word problems over permutation groups

A sample is a pure function of seed, index and lengths: the same in any batch, in any order and on any device.
"""
