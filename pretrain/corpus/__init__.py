"""Corpora: from text to token ids on disk, and back as one stream of tokens.

build           `lrnn corpus`: source -> parts -> shards of token ids, with checksums and a manifest
source          documents, parts, and the rule by which a document is held out
locate          what a source is: its files, and of which kind
file_rows, json_rows, open_file, rows
                the rows of a file of any kind, and what makes one unusable
file_source     files as a source: a first pass over them, pieces of equal work
streams         a source as a stream, with a position that a checkpoint can store
traces          generated programs as a source
dataset         what only `datasets.load_dataset` can read
shard_writer    one part of a source -> one shard per split
finish          written shards -> a corpus, with its manifest
shard_table     the checksums and the layout of a shard, in a file beside it
reader          `TokenCorpus`: the shards of a split as one stream of tokens with document boundaries
block_reader    reads a shard in blocks, each checked against its checksum at every read
"""


def __getattr__(name: str):
    """Return `TokenCorpus`, which people read corpora with, without loading the reader for everything else here."""
    if name == "TokenCorpus":
        from lrnn.pretrain.corpus.reader import TokenCorpus

        return TokenCorpus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
