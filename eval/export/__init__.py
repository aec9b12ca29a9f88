"""Export a checkpoint as a model folder that transformers (or fla) loads without lrnn.

    command.py        `lrnn export`
    import_folder.py  `lrnn import`
    read.py           makes a model, with tokenizer and history, of a checkpoint or of a model folder (lrnn.formats)
    write.py          these become a folder: weights, configuration, code, tokenizer, model card
    tokenizer.py      converts the tokenizer, and compares its ids with the original's
    model_card.py     README.md, in the form that the Hugging Face hub reads; architecture.py describes the model in it
    hub.py            uploads the folder to the Hugging Face hub, if asked to
    check.py          reads the folder back, with lrnn and in a process without it (reload_child.py)
    check_fla.py      compares the folder with what fla reads from it

The folder appears under its name only after the check has passed.
"""
