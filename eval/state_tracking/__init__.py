"""State-tracking tasks as text, for pretrained language models.

    tasks.py      a sample of a generator in lrnn.track.tasks becomes a question in words or in Python
    documents.py  questions become documents: solved examples in front, several lengths, balanced answers
    report.py     scores per document become one score per kind, and accuracy by task and length

The task files in eval/suites/tasks/state_tracking pass the documents to lm-eval, and the suite `state_tracking` runs
them. Small models trained on the same generators are in lrnn/track.
"""
