"""Memory and time of a layout on a cluster, from models built on the meta device: nothing is allocated or sent.

Must not import: data, checkpoint, trainer, inference.
"""
