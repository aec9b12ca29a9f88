"""Published results of other models, with the protocol behind each, to set beside results of `lrnn eval`.

tables.yaml    the figures, as printed, by paper and table
tables.py      reads them
beside.py      chooses those whose metrics a result has, and says what differs in protocol
"""
