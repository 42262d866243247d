"""N frozen experts as one denoiser: its steps, the hooks of a step, and placement of experts."""
