"""megatron_hgpt: train, evaluate and serve HealthGPT on NVIDIA Megatron-Core."""

__version__ = "0.1.0"
