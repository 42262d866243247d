"""Experts whose files hold quantised weights: scaled and plain fp8 of ComfyUI, and GGUF."""
