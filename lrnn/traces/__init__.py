"""Python programs to execute in one's head, each with a question at its end: what evaluation asks and corpora teach.

    program.py       a program, the half of all programs that it belongs to, and random draws
    variables.py     variables that are swapped, rotated and assigned: bits and small integers
    permutations.py  variables permuted by tuple assignments: S3 and S5; moves that others use too
    repl.py          the same as a session of the interpreter, with values printed now and then
    recall.py        bits at an index that swaps move
    automaton.py     the log of a finite automaton
    stack.py         the depth of a stack, and the bracket on its top
    formats.py       all of them by name
    training.py      documents for a corpus

All programs are divided into two halves by a hash of how they begin. Evaluation asks about programs of one half, and
training documents hold programs of the other half only. The suite is in lrnn/eval/traces.
"""
