"""Compile every launch configuration of the Triton kernels ahead of time, without a GPU, and read the machine code.

`python -m benchmarks.kernels` prints a table and writes it to `benchmarks/kernels.md`. The launches are those the ops make:
they run on meta tensors, and what they would have launched is compiled for each compute capability instead.
"""

import argparse
import contextlib
import datetime
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

if __name__ == "__main__" or True:
    pass
