"""Experts on a device: slots, copies and kernels on a GPU, or on an emulated one.

:mod:`gpu_experts.device` says what a device is, :mod:`gpu_experts.backends` lists the kinds there
are: a folder each. Importing this package, or that list, loads neither numpy, torch nor triton.
"""
