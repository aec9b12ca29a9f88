"""The report of `lrnn ladder`: what the trained cells show, and what they cannot show.

    write.py         `write_report`: all files of OUT/report
    gathered.py      results by group (size, arm, range, tokens, learning rate), seed and figure
    differences.py   negative - positive and arm - reference, paired by seed and document, with their intervals
    intervals.py     Student's t, pooled scatter, two sources of error, Holm's adjustment
    fit.py           loss by parameters and tokens: one shape for all arms, an offset for each; bootstrap over seeds
    sections.py      the findings, results and differences as text and tables; wording.py how numbers are written
    protocol.py      what was run: sizes, arms, cells, cost, versions, corpora, and warnings
    pictures.py      pictures of results and differences;  curves.py of the training;  style.py colours and lines
    document.py      sections as Markdown;  page.py as one HTML page

Nothing is chosen by its outcome: all figures of all cells are in results.csv, all differences in differences.csv, and
the family that Holm's adjustment counts is fixed in `gathered.HEADLINES`.
"""
