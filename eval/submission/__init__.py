"""Evaluations as an array of SLURM jobs: `lrnn submit --eval`.

models.py     run folders, checkpoints and model folders become the models to evaluate
requests.py   suites, tasks and the options of `lrnn eval` become requests, checked before anything is submitted
table.py      the table of jobs: one line per model and request, and which of its lines are still queued
submit.py     what is left becomes a table and an array of `slurm/eval.sbatch`; `slurm/collect.sbatch` follows
"""
