"""Triton kernels of the training step in bf16 on a GPU.

Each file fuses what the plain code named in its docstring defines; models/ops.py chooses between
the two, and tests/models/test_fused.py and tests/optim/test_master_weights.py hold them together.
Shapes are as in models/model.py and models/moe.py.
"""
