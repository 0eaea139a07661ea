"""One HTML page about a run: its curves, its settings, its scores and its examples.

Must not import: torch, megatron, model, inference, trainer.
"""
