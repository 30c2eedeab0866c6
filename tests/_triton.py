"""Whether the triton that the kernels need is there."""

import pytest

from drifa_attn.ops.choose import MINIMUM_TRITON


def skip_without_triton():
    """Skip a file of tests where triton is missing, or older than the kernels."""
    pytest.importorskip("triton", minversion=".".join(map(str, MINIMUM_TRITON)))
