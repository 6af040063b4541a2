"""Experts on a device: slots, copies and kernels on a GPU, or on an emulated one.

``gpu_experts.device`` says what a device is; :mod:`gpu_experts.cuda.device` and
:mod:`gpu_experts.emulated.device` are two. Importing this package loads neither torch nor triton.
"""
