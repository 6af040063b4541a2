"""Everything device: slots, copies and expert kernels on a GPU or an emulated one.

Nothing is implemented yet: models run on the CPU alone, and the report says so.
"""
