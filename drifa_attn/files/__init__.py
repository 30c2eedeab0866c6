"""Attention in files: written, read, and put back on a fresh network."""

from .checkpoint import load_attention, save_attention

__all__ = ["load_attention", "save_attention"]
