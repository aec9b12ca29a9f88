"""Corpora: from text to token ids on disk, and back as one stream of tokens.

build           `lrnn corpus`: source -> parts -> shards of token ids, with checksums and a manifest
source          documents, parts, and the rule by which a document is held out
folder, dataset the sources: files of a folder, rows of anything that `datasets.load_dataset` takes
shard_writer    one part of a source -> one shard per split
shard_table     the checksums and the layout of a shard, in a file beside it
reader          `TokenCorpus`: the shards of a split as one stream of tokens with document boundaries
block_reader    reads a shard in blocks, each checked against its checksum at every read
"""
