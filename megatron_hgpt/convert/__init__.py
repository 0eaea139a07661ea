"""Weights of Hugging Face folders in and out of Megatron's language model, through one table for both directions.

Must not import: megatron, transformers, hlora, vision, model.
"""
