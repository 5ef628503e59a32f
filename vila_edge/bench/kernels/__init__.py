"""Our own kernels on the GPU at hand: `run.bench_kernels` measures, `report` writes it down, `targets` judges."""
