"""What the language model reads and writes: tokenizer, chat templates with their masks, one vocabulary for all tokens.

Must not import: torch, megatron, backbone, data.
"""
