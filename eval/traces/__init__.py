"""Tracking in programs: Python that a pretrained language model executes in its head.

    documents.py  programs of lrnn.traces become documents: solved examples in front, several lengths, balanced answers
    report.py     what the report of the suite shows

The task files in eval/suites/tasks/traces pass the documents to lm-eval, and the suite `traces` runs them.
"""
