"""A ladder of pretraining runs: sizes, arms, ranges, seeds and budgets, each trained, exported, measured and compared.

config.py       the YAML file: sizes, arms, grids of them, what is measured
cells.py        the runs of a ladder, checked before the first one starts
sizes.py        the number of parameters of a model
results.py      what is kept of a run: small files, from which alone the report is made
measure/        what is measured of one model
measures.py     the measures by name
"""
