"""VL-Health's records as conversations of text and pictures: one reader per file format.

Must not import: torch, megatron, vision, data.
"""
