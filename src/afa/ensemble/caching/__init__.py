"""Faster denoising loops: the feature cache, pruning plans and CUDA graphs."""
