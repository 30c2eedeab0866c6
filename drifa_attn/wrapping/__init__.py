"""Attention into one network, and the verbs for what a network holds."""
