"""Distil an ensemble into one ordinary model, which every program loads.

A teacher draws pictures, and its noisy latents and predictions are kept. Then, without the teacher
in memory, a student of one expert's architecture learns to make the same predictions.
"""
