"""SIPaKMeD: cells of pap smears, grouped by slide."""

import re
from pathlib import Path

import numpy as np

from examples.drifa_net.sources.collection import Collection, by_class, pictures_below, visible

START = "im_"


def marks(root: Path) -> list[Path]:
    """What in a folder tells this collection."""
    return [path for path in visible(root) if path.is_dir() and path.name.lower().startswith(START)]


def read(root: Path) -> Collection:
    """SIPaKMeD: the cropped cells of each class, the slide before the underscore of a cell's name."""
    files, slides = {}, []
    for folder in marks(root):
        label = folder.name[len(START) :]
        files[label] = [path for path in pictures_below(folder) if path.parent.name.lower() == "cropped"]
        for path in files[label]:
            slide = re.fullmatch(r"(\d+)_\d+", path.stem)
            if slide is None:
                raise ValueError(
                    f"sipakmed: {path} is not named <slide>_<cell>{path.suffix}, so its slide is unknown: rename or delete it."
                )
            slides.append(f"{label}/{slide[1]}")
    return by_class("sipakmed", root, files, groups=np.array(slides), turns=True)
