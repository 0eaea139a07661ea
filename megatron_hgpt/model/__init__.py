"""HealthGPT: tower, adapters and language model in one module, its initial weights, and how many parameters it has.

Must not import: convert, data, engines, checkpoint.
"""
