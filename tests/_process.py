"""Runs a program as a user would."""

import subprocess


def run(*command, **options):
    """What the program prints; an error if it fails."""
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout
