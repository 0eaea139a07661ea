"""A stand-in for Transformer Engine in fp64 on a CPU, so that megatron.core's own wrappers of it run in tests.

It keeps the contract that those wrappers and H-LoRA rely on, as read in Transformer Engine 2.11: constructor
arguments, names and attributes of parameters, what forward returns, where tensor parallelism communicates, and that
the norm's output comes back whole, local and with its gradient added behind the reduced one.

What it proves: shapes, names, flags, the formula and its gradients at every layout, checkpoints, the layer spec.
What it does not: kernels, precision, FP8, memory, speed, or that a later Transformer Engine keeps the contract. Those
are tests/gpu's.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
