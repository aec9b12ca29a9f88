"""Questions about something that a long text says once: needles in a haystack, and lists of keys and values.

    needles.py    the needles' documents, of 1,024 to 32,768 tokens
    haystack.py   the text that needles are hidden in: a file's sentences or generated ones
    windows.py    documents cut around the answer, with JRT's prompts
    pairs.py      lists of 4 to 256 keys and values
    words.py      words for keys and generated sentences
    report.py     accuracy, answered, and accuracy given answered, by length and by depth

The tasks are in lrnn/eval/suites/tasks/needle and recall.
"""
