"""Model folders of others, and of lrnn: their configurations and the names of their weights, in both directions.

    fla.py          models of flash-linear-attention, whose weights have lrnn's names
    olmo_hybrid.py  transformers' class `olmo_hybrid`, with the names that it and vLLM read, and those that it saves
    config.py       the configuration of a folder of any of these formats, as fields of lrnn's model
    tensors.py      the safetensors files of a folder: names, shapes and dtypes first, values when they are asked for
    folder.py       a folder of any of these formats, with its weights under lrnn's names
    tokenizers.py   whether two tokenizers give the same ids

Nothing is unpickled, and no code of a folder is run.
"""
