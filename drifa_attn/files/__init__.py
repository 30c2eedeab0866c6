"""Attention in files: written, read, and put back on a fresh network."""
