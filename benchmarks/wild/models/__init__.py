"""The networks, a file for each library, built from their configuration; nothing is downloaded."""
