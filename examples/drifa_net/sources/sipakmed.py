"""SIPaKMeD: cells of pap smears, grouped by slide."""

import re
from pathlib import Path

import numpy as np

from examples.drifa_net.sources.collection import Collection, by_class


def marks(root: Path) -> list[Path]:
    """What in a folder tells this collection."""
    return list(root.glob("im_*"))


def read(root: Path) -> Collection:
    """SIPaKMeD: the cropped cells of each class, the slide before the underscore of a cell's name."""
    files, slides = {}, []
    for folder in sorted(path for path in root.glob("im_*") if path.is_dir()):
        label = folder.name.removeprefix("im_")
        files[label] = sorted(folder.rglob("CROPPED/*.bmp"))
        for path in files[label]:
            slide = re.fullmatch(r"(\d+)_\d+", path.stem)
            if slide is None:
                raise ValueError(
                    f"sipakmed: {path} is not named <slide>_<cell>.bmp, so its slide is unknown: rename or delete it."
                )
            slides.append(f"{label}/{slide[1]}")
    return by_class("sipakmed", root, files, groups=np.array(slides))
