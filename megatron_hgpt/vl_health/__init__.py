"""VL-Health's records as conversations of text and pictures: one reader per file format.

Must not import: megatron, model, data, demo.
"""
