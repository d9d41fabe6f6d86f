"""Blocks that models are made of. No model names, no config object: numbers and functions come in, arrays come out.

Letters, for shapes in the whole house:
    B batch, T text length, N media per example, S media length, K supervised positions, D hidden, E encoder width, F ffn,
    H heads, G key/value heads, C head dim, L layers, V vocabulary.

Every weight stands on one line with its shape, logical axes and initialiser. Kernels are 2-D [in, out]; a stacked model has layers on axis 0.
Computation runs in the dtype of its input; weights are cast to it.
"""
