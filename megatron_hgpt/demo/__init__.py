"""What the demonstration alone needs: a miniature VL-Health out of installed packages, tiny tokenizers and checkpoints.

Must not import: megatron, testing, cli.
"""
