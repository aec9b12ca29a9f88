"""A run that begins with weights that were trained before: `init_from` of its configuration.

model.py    the model of the run: that of the folder, with the fields that the run changes
source.py   where the weights are: a model folder of a format of `lrnn.formats`, a run, or one of its checkpoints
weights.py  checks that weights, model and tokenizer fit together, and fills the model of the run
record.py   what a checkpoint keeps of where its run began, by which a run resumes without the folder
"""
