"""DRIFA-Net of arXiv:2412.01248 (WACV 2025), built from this library: its model and its data."""
