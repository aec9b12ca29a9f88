"""Checkpoints: from the training state in a ZeRO optimizer to a verified folder on disk, and back.

`zero_state` names what a rank holds of the training state: fragments of parameters and of Adam's moments. `writer`
copies them into host memory after a step and writes them in a thread, one file per rank, into a hidden folder.
`format` is the layout of a checkpoint: it seals every file, writes the manifest last, verifies all of it when a run
starts, and says which checkpoints are kept. `reader` gives any slice of any parameter out of these files, so that
`zero_state` can fill the fragments of a run with another number of processes or another ZeRO stage.

A checkpoint is whole or invisible, and nothing in it is executed when it is read.
"""
