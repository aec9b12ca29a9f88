"""A ladder of pretraining runs: sizes, arms, ranges, seeds and budgets, each trained, exported, measured and compared.

measure/        what is measured of one model
measures.py     the measures by name
"""
