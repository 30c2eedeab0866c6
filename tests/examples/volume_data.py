"""Volumes in small, as NIfTI files and DICOM series: noise with a bright block whose place is known."""

import numpy as np

RIGHT, FRONT, HEAD = 0, 1, 2  # axes of what `block` gives


def block(label=0, seed=0, size=(12, 10, 8)):
    """Noise from 0 to 100, by millimetres to the right, front and head; of 400 a block at the right, the front, or the head."""
    values = np.random.default_rng(seed).integers(0, 100, size).astype(np.int16)
    place = [slice(None)] * 3
    place[label] = slice(2 * size[label] // 3, None)
    values[tuple(place)] = 400
    return values


def write_nifti(path, values, axes="RAS"):
    """A NIfTI file whose array lies along these axes: "LPS" counts to the left, the back and the head."""
    nibabel = __import__("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 2.0, 1.0]))
    turned = nibabel.orientations.axcodes2ornt(tuple(axes))
    nibabel.save(image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), turned)), path)
    return path


def write_series(folder, values, *, slope=2.0, intercept=-10.0, gap=2.0, order=None, uid="1.2.3"):
    """A DICOM series, a file a slice from the feet up, as a scanner has it: rows to the left, columns to the back."""
    pydicom = __import__("pydicom")
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.round((values - intercept) / slope).astype(np.int16)
    for number, k in enumerate(order if order is not None else range(values.shape[2])):
        one = pydicom.Dataset()
        one.file_meta = pydicom.dataset.FileMetaDataset()
        one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"{uid}.{number + 1}"
        one.SeriesInstanceUID, one.Modality, one.InstanceNumber = uid, "CT", number + 1
        one.ImageOrientationPatient, one.PixelSpacing = [1, 0, 0, 0, 1, 0], [1.0, 1.0]
        one.ImagePositionPatient = [0.0, 0.0, gap * k]
        pixels = stored[::-1, ::-1, k].T  # columns count to the left, rows to the back
        one.Rows, one.Columns = pixels.shape
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.RescaleSlope, one.RescaleIntercept = slope, intercept
        one.PixelData = np.ascontiguousarray(pixels).tobytes()
        one.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)
    return folder
