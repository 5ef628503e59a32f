"""The decoder of released models on the GPU at hand, with random weights: `run` measures, `report` writes it down."""
