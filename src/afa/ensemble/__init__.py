"""N frozen experts as one denoiser: one step, its hooks, and where experts are kept."""
