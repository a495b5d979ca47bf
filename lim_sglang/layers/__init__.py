"""Layers of SGLang's models that run by our kernels in decode steps."""
