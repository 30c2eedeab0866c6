"""The paper's layers, one file a figure. Knows tensors; knows no network, no hook and no file."""
