"""Answers and pictures from a trained checkpoint: loading, decoding with a KV cache, pictures drawn during training.

Must not import: engines, trainer, evaluation, report.
"""
