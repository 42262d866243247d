"""ComfyUI's denoisers as families of afa: one record each, in one file."""
