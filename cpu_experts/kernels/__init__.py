"""The inner loops over packed weights: vector intrinsics, scalar twins, the experts' products."""
