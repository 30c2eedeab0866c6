"""Volumes: NIfTI files and folders with a DICOM series, turned to one orientation and scaled. Needs nibabel and pydicom."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from examples.drifa_net.sources.collection import check_one_kind, visible

PERCENTILES = (0.5, 99.5)  # of a volume's own values, which become black and white where no window is given
APART = 1.5  # a gap between slices that is so many times the usual one: some are missing
ROUNDING = 0.01  # of a millimetre: slices that are closer lie at one place

Window = tuple[float, float]


def needed(name: str) -> ModuleType:
    """A package of the extra; an `ImportError` that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'volumes need the package {name}: pip install "drifa-attn[volumes]".') from error


def check_volumes(paths: Sequence[Path]) -> None:
    """Raise unless these can be volumes: all of them, each a NIfTI file or a folder, and the packages are there."""
    check_one_kind(paths)
    if lone := [path for path in paths if path.suffix.lower() == ".dcm" and not path.is_dir()]:
        raise ValueError(f"{lone[0]} is one file of a DICOM series: name the folder that holds the series.")
    for name in ("nibabel", "pydicom") if any(path.is_dir() for path in paths) else ("nibabel",):
        needed(name)


def said_of(window: Window | None) -> str:
    """What is done to volumes, as a run prints it."""
    scale = f"from {window[0]:g} to {window[1]:g}" if window else "from {} to {} % of each volume's own".format(*PERCENTILES)
    return f"volumes stand with the head up, front to back and right on the right; values {scale} are black to white"


def resized(path: Path, size: Sequence[int], window: Window | None) -> np.ndarray:
    """A volume as `d h w` uint8: from feet to head, back to front and left to right, averaged where it shrinks."""
    values = read_volume(path)
    low, high = window or np.percentile(values, PERCENTILES)
    x = torch.from_numpy(values.clip(low, high))[None, None]
    x = F.adaptive_avg_pool3d(x, [min(pair) for pair in zip(values.shape, size, strict=True)])
    x = F.interpolate(x, tuple(size), mode="trilinear")[0, 0]
    return (255 * (x - low) / ((high - low) or 1)).round().clamp(0, 255).to(torch.uint8).numpy()


def read_volume(path: Path) -> np.ndarray:
    """The values of a volume `d h w`, float32, with axes from feet to head, back to front and left to right.

    Raises: ValueError: no volume that can be read, or a series that is not one.
    """
    nibabel = needed("nibabel")
    try:
        image = series(path, nibabel) if path.is_dir() else nibabel.load(path)
        values = np.asarray(nibabel.as_closest_canonical(image).dataobj, np.float32)
    except ImportError:
        raise
    except Exception as error:  # of many kinds, by nibabel, pydicom, zlib and decoders
        raise ValueError(f"{path} is no readable volume ({error}): unpack it again, or leave it out.") from error
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"{path} has axes of {values.shape}: a volume has three. Give one of its parts.")
    if not np.isfinite(values).any():
        raise ValueError(f"{path} has no finite value: leave it out.")
    least = float(values[np.isfinite(values)].min())
    return np.ascontiguousarray(np.nan_to_num(values, nan=least, posinf=least, neginf=least).transpose(2, 1, 0))


def series(folder: Path, nibabel: ModuleType) -> Any:
    """The DICOM series in a folder as an image of nibabel: slices in the order of their places, values rescaled."""
    pydicom = needed("pydicom")
    found = [pydicom.dcmread(path) for path in visible(folder) if path.is_file() and path.name.upper() != "DICOMDIR"]
    slices = [one for one in found if "PixelData" in one]
    if not slices:
        raise ValueError("it holds no DICOM file with an image")
    if len({one.SeriesInstanceUID for one in slices}) > 1:
        raise ValueError("it holds several series: give each a folder")
    if any("ImagePositionPatient" not in one or one.get("NumberOfFrames", 1) != 1 for one in slices):
        raise ValueError("its files do not say where each slice lies")
    right, down = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    places = np.array([np.cross(right, down) @ np.array(one.ImagePositionPatient, float) for one in slices])
    order = np.argsort(places)
    gaps = np.diff(places[order])
    if (gaps < ROUNDING).any():
        raise ValueError("two of its slices lie at one place: it holds several times or echoes")
    if len(gaps) and gaps.max() > APART * np.median(gaps):
        around = places[order][gaps.argmax() :][:2]
        raise ValueError("slices are missing between {:.1f} and {:.1f} mm".format(*around))
    slices = [slices[i] for i in order]
    values = np.stack([pydicom.pixels.apply_rescale(one.pixel_array, one) for one in slices])
    if values.ndim != 3:
        raise ValueError("its images have colours")
    return nibabel.Nifti1Image(values.transpose(2, 1, 0).astype(np.float32), affine_of(slices, right, down))


def affine_of(slices: Sequence[Any], right: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Where column, row and slice lie in millimetres to the right, the front and the head."""
    first, last = (np.array(one.ImagePositionPatient, float) for one in (slices[0], slices[-1]))
    rows, columns = map(float, slices[0].PixelSpacing)
    step = (last - first) / (len(slices) - 1) if len(slices) > 1 else np.cross(right, down)
    affine = np.eye(4)
    affine[:3] = np.stack([right * columns, down * rows, step, first], 1)
    affine[:2] *= -1  # DICOM counts to the left and to the back
    return affine
