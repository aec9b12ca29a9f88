"""Perplexity by position, far past the training length.

    command.py   `lrnn position`
    evaluate.py  checks the request, finds long documents, measures each model, writes the result folder
    nll.py       reads documents piece by piece, passing the state on, and sums negative log-likelihoods per bin
    bins.py      bins of position on a logarithmic scale
    report.py    sums become curves with bootstrap bands, and these become files

Documents come from lrnn.eval.documents, the bootstrap from lrnn.eval.statistics.
"""
