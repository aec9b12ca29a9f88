"""Data of a run: from corpora or a stream to the micro-batches of each step.

training_data   open what `config.data` names; check it; make the loader of this rank
samples         `CorpusData`: sample number -> tokens, by `order` (a pure function of seed and number)
chains          `Chains`: which samples follow one another in a row, if states are passed on
stream          `StreamData` and `StreamLoader`: a streamed data set, tokenised while training
staged          `StagedData`: the data of a run in stages, and `StagedLoader`
loader          `Loader`: the steps of one process, from `CorpusData`, prepared ahead by `prefetch`
micro_batch     `MicroBatch`: inputs, labels and document boundaries of one forward pass
heldout         `HeldOut`: the loss on the held-out splits, measured between steps

The position in the data is one integer, the number of samples consumed; a stream stores its own position besides.
"""
