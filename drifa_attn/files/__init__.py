"""Attention in files, folders and repositories: written, read, and put back on a fresh network."""

from .checkpoint import load_attention, save_attention
from .hub import from_pretrained, push_to_hub, save_pretrained

__all__ = ["from_pretrained", "load_attention", "push_to_hub", "save_attention", "save_pretrained"]
