"""A ladder of pretraining runs: sizes, arms, ranges, seeds and budgets, each trained, exported, measured and compared.

config.py       the YAML file: sizes, arms, grids of them, what is measured
cells.py        the runs of a ladder, checked before the first one starts
sizes.py        the number of parameters of a model
ladder.py       the command
run_here.py     runs the cells that are left on the GPUs of this machine; devices.py, progress.py
cell.py         one cell: training, export, measures, result; processes.py starts what runs
kept.py         which cells are done, and with which settings
submit.py       runs them as arrays of SLURM jobs
cost.py         what is left to train, and how long it takes
results.py      what is kept of a run: small files, from which alone the report is made
measure/        what is measured of one model
measures.py     the measures by name
"""
