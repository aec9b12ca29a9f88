"""State tracking: train small models on generated tasks, and report which track state at lengths not seen in training.

    track.py       `lrnn track`
    grid.py        the YAML file becomes cells: tasks x models x eigenvalue ranges x seeds, all checked first
    workers.py     cells over several devices, one process per device
    interleave.py  several cells at once on one device, driven by one thread
    cell.py        one cell: training with records and checkpoints, then measurement; resumed if it was stopped
    training.py    the training step, on a GPU as one CUDA graph
    measure.py     accuracy by length, with the scores of metrics.py
    report.py      results become tables, with the plots of pictures.py and the papers' figures of papers.py
    tasks/         the generators

The same tasks as text, for pretrained language models, are in eval/state_tracking.
"""
