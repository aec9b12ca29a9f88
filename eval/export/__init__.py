"""Export a checkpoint as a model folder that transformers (or fla) loads without lrnn.

    command.py     `lrnn export`
    read.py        a checkpoint, or a model folder of fla, becomes a model with its tokenizer and its history
    write.py       these become a folder: weights, configuration, code, tokenizer, model card
    tokenizer.py   converts the tokenizer, and compares its ids with the original's
    fla_format.py  model folders of flash-linear-attention
    model_card.py  README.md, in the form that the Hugging Face hub reads
    hub.py         uploads the folder to the Hugging Face hub, if asked to
    check.py       reads the folder back, with lrnn and in a process without it (reload_child.py)

The folder appears under its name only after the check has passed.
"""
