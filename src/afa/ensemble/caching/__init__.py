"""What denoising loops can do without: one cache for all experts, and half of the guidance."""
