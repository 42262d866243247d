"""The study of distilled ensembles on emoji scenes that docs/distillation.md shows."""
