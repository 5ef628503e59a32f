"""Slow, exact interpreters: what the graphs and kernels are measured against."""
