"""LessIsMore sparse attention for reasoning models, as a plugin of SGLang."""

__version__ = "0.1.0"
