"""CUDA kernels of our own, seen from Python: what there is, how their data lies, and what launches them. numpy alone."""
