"""The frozen language model: what its config.json says, Megatron's configuration of it, which layers compute it.

Must not import: hlora, model, text, data.
"""
