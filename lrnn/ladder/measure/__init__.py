"""What is measured of one trained and exported model.

measure.py      everything, with one loaded model
settings.py     the section `measure` of a ladder
heldout.py      held-out loss by document, in windows as training sees them
questions.py    tasks of lm-eval: right answers of benchmarks, program traces, recall, needles
position.py     loss by position, far past the training length
training.py     facts and eigenvalues from the records of the run
parts.py        figures with the values of documents behind them, kept on disk meanwhile
"""
