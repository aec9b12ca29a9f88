"""Imported last by the process of fork_server.py, so that forks never search what it imported for garbage."""

import gc

gc.collect()
gc.freeze()
