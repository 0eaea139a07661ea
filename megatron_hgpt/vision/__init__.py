"""Pictures in and out: the CLIP tower at the depth of each task, its adapters, and the VQGAN of pictures as tokens.

Must not import: megatron, text, backbone, hlora, model, data.
"""
