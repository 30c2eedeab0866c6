"""scikit-learn's digits, as two views."""

import numpy as np
from sklearn.datasets import load_digits

from examples.drifa_net.sources.collection import Collection


def halves() -> tuple[Collection, Collection, np.ndarray]:
    """Left and right halves of scikit-learn's 1797 scanned digits of 8x8, two real views of one thing; even (0) or odd (1)."""
    pixels, digits = load_digits(return_X_y=True)
    pixels = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    classes = tuple(map(str, range(10)))
    left, right = (
        Collection(name, None, np.ascontiguousarray(half), digits, classes)
        for name, half in (("left", pixels[:, :, :4]), ("right", pixels[:, :, 4:]))
    )
    return left, right, digits % 2
