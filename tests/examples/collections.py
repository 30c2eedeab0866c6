"""Each public collection in small, as its publisher ships it: the same folders and file names, noise for images."""

import csv
import io

import numpy as np
from PIL import Image

KINDS = ("ham10000", "sipakmed", "brain_mri", "iq_othnccd")
LESIONS, BRAIN = 8, 12  # lesions of a class, training slices of a class


def picture(seed, form=None, size=24):
    """Noise in blocks that survive a JPEG; as an image, or as a file's bytes if a form is named."""
    blocks = np.random.default_rng(seed).integers(0, 256, (size // 4, size // 4, 3), np.uint8)
    image = Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC)
    if form is None:
        return image
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def ham10000(root):
    """Three classes, 8 lesions each, of which every other has two images; both image folders."""
    rows, number = [], 0
    for dx in ("nv", "mel", "bkl"):
        for lesion in range(LESIONS):
            for _ in range(1 + lesion % 2):
                image = f"ISIC_{number:07d}"
                save(picture(number), root / f"HAM10000_images_part_{1 + number % 2}" / f"{image}.jpg")
                rows.append((f"HAM_{dx}{lesion}", image, dx, "histo", "50.0", "male", "back"))
                number += 1
    with (root / "HAM10000_metadata.csv").open("w", newline="") as lines:
        csv.writer(lines).writerows([("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"), *rows])


def sipakmed(root):
    """Two classes, 8 slides each, two cells a slide; whole slides beside them."""
    seed = 1000
    for name in ("Parabasal", "Metaplastic"):
        inner = root / f"im_{name}" / f"im_{name}"
        for slide in range(1, 9):
            save(picture(seed := seed + 1), inner / f"{slide:03d}.bmp")
            (inner / "CROPPED").mkdir(exist_ok=True)
            for cell in (1, 2):
                save(picture(seed := seed + 1), inner / "CROPPED" / f"{slide:03d}_{cell:02d}.bmp")
            (inner / "CROPPED" / f"{slide:03d}_01_cyt01.dat").write_text("0,0\n")


def brain_mri(root):
    """Two classes, 12 training and 4 test slices each."""
    seed = 2000
    for part, short, count in (("Training", "Tr", BRAIN), ("Testing", "Te", 4)):
        for name, prefix in (("glioma", "gl"), ("notumor", "no")):
            for number in range(count):
                image = picture(seed := seed + 1).convert("L")
                save(image, root / part / name / f"{short}-{prefix}_{number:04d}.jpg")


def iq_othnccd(root):
    """Three classes of 60, 62 and 64 slices, and unlabelled ones."""
    seed = 3000
    for count, name in ((60, "Bengin"), (62, "Malignant"), (64, "Normal"), (1, "Test")):
        for number in range(count):
            save(picture(seed := seed + 1), root / f"{name} cases" / f"{name} case ({number + 1}).jpg")


def build(kind, root):
    """Write a collection of that kind to a folder, and return the folder."""
    root.mkdir(parents=True, exist_ok=True)
    {"ham10000": ham10000, "sipakmed": sipakmed, "brain_mri": brain_mri, "iq_othnccd": iq_othnccd}[kind](root)
    return root


def write_archive(path, *, count=40, colour=True, key=None, split=False, size=(12, 10), seed=0):
    """An archive of two classes, with groups of two under a key and with a split if asked for; its arrays."""
    draw = np.random.default_rng(seed)
    arrays = {
        "images": draw.integers(0, 256, (count, *size, 3) if colour else (count, *size), np.uint8),
        "labels": np.arange(count, dtype=np.uint8) // 2 % 2,
        "classes": np.array(["a", "b"]),
    }
    if key:
        arrays[key] = np.arange(count) // 2
    if split:
        arrays["split"] = np.repeat([0, 1, 2], [count - 2 * (count // 4), count // 4, count // 4])
    np.savez(path, **arrays)
    return arrays
