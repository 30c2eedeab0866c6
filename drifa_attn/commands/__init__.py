"""The command line: one file for each command. It may use every other room, and timm; nobody imports it."""
