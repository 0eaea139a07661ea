"""From records to micro-batches: preprocessing into mmap files, packing, the loader, and the cache of tower features.

Must not import: hlora, model, build, engines.
"""
