"""Images of one's own, four public collections in the form their publishers ship them, and scikit-learn's digits.

Each kind, what it is, where to get it, its licence as far as known (what the page says counts), and what its folder holds:

- `ham10000`: lesions of the skin; Harvard Dataverse, doi:10.7910/DVN/DBW86T; CC BY-NC 4.0;
  `HAM10000_metadata.csv`, `HAM10000_images_part_1/*.jpg`, `HAM10000_images_part_2/*.jpg`.
- `sipakmed`: cells of pap smears; cs.uoi.gr/~marina/sipakmed.html; for experiments if its paper is cited, no formal licence;
  `im_<class>/.../CROPPED/<slide>_<cell>.bmp`.
- `brain_mri`: tumours of the brain, collected by M. Nickparvar; kaggle.com/datasets/masoudnickparvar/brain-tumor-mri-dataset;
  CC0 1.0; `Training/<class>/*.jpg`, `Testing/<class>/*.jpg`.
- `iq_othnccd`: CT slices of the lung; Mendeley Data, doi:10.17632/bhmdr45bh2; CC BY 4.0;
  `Bengin cases/`, `Malignant cases/`, `Normal cases/`.
- `npz`: an archive of one's own: `images` (n, h, w) or (n, h, w, 3) of uint8, `labels` (n), `classes`, and perhaps `split` (n;
  0 train, 1 validation, 2 test) and `lesion_id`, `slide` or `group` (n), whose images stay together. Slides are numbered
  within their class, as SIPaKMeD's are. `sample` (n) names each sample, so that archives of the same samples are paired.
- `folder`: images or volumes (`.nii`, `.nii.gz`, a folder for each DICOM series) of one's own, a folder a class, perhaps within
  folders `train`, `val` and `test`; or without classes.

Nothing is downloaded: read each one's conditions before use. The folder may be the one an archive unpacked to, with the
collection inside as its only folder. HAM10000's images are grouped by lesion, SIPaKMeD's by slide. The other two say nothing of
patients, so slices of one may be in several splits, and results on them are optimistic.

To add a collection: a file with `read(root)` and `marks(root)`, which tells the collection by its folder, and a line in
`READERS`.
"""

from pathlib import Path
from types import ModuleType

from examples.drifa_net.sources import brain_mri, folder, ham10000, iq_othnccd, npz, sipakmed
from examples.drifa_net.sources.collection import SUFFIXES, UNLABELLED, Collection, pictures_below, visible, volumes_below
from examples.drifa_net.sources.digits import halves

__all__ = ["READERS", "UNLABELLED", "Collection", "halves", "read"]

READERS: dict[str, ModuleType] = {
    "ham10000": ham10000,
    "sipakmed": sipakmed,
    "brain_mri": brain_mri,
    "iq_othnccd": iq_othnccd,
    "npz": npz,
    "folder": folder,
}
MARKED = [kind for kind, reader in READERS.items() if hasattr(reader, "marks")]


def read(path: str | Path, kind: str | None = None) -> Collection:
    """The collection in a folder or archive.

    Args:
        path: the folder, or one around it; or an .npz.
        kind: a key of `READERS`; None for the one whose marks the folder has.

    Raises: FileNotFoundError, ValueError: nothing there, a part of it missing, or a file that is not what it should be.
    """
    path = Path(path)
    if kind is not None and kind not in READERS:
        raise ValueError(f"read expected kind to be one of {', '.join(READERS)}, got {kind!r}.")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name the folder of a collection or an .npz archive.")
    if kind == "npz" or (kind is None and path.is_file()):
        return npz.read(path)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: {kind} is read from the folder its archives unpack to.")
    root, found = path, matching(path)
    while not found and len(inside := visible(root)) == 1 and inside[0].is_dir():
        root = inside[0]
        found = matching(root)
    if len(found) > 1 and kind is None:
        raise ValueError(f"{path} looks like {' and '.join(found)}: give the folder of one of them.")
    kind = kind or (found[0] if found else "folder")
    collection = READERS[kind].read(root if found else own(path) if kind == "folder" else path)
    if len(collection.classes) < 2 and (kind != "folder" or collection.classes):
        got = ", ".join(collection.classes) or "none"
        raise ValueError(f"{collection.name}: {root} needs images of at least two classes, got {got}: unpack the others.")
    return collection


def own(root: Path) -> Path:
    """The folder with class folders in this one, which may be what an archive unpacked to; an error if it has no images."""
    while len(inside := visible(root)) == 1 and inside[0].is_dir() and any(path.is_dir() for path in visible(inside[0])):
        root = inside[0]
    if not pictures_below(root) and not volumes_below(root):
        kinds = ", ".join(sorted(SUFFIXES))
        raise ValueError(f"{root} holds no collection ({', '.join(MARKED)}) and no images ({kinds}).")
    return root


def matching(root: Path) -> list[str]:
    """The kinds whose marks a folder has."""
    return [kind for kind in MARKED if READERS[kind].marks(root)] if root.is_dir() else []
