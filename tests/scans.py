"Small scans made for tests: DICOM series, image files and label maps, right or broken in one named way."
import base64
import io
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, generate_uid

from bmd_xray.volume import TOTALSEGMENTATOR, Volume, write_volume

SHAPE = 8, 24, 32 # z, y, x


def body(shape=SHAPE):
    "HU of a slab of muscle with a femur on each side, in air."
    z, y, x = np.indices(shape)
    hu = np.full(shape, -1000, np.int16)
    hu[:, 4:20, 2:30] = 40
    for at in (8, 23): hu[(x - at)**2 + (y - 12)**2 < 16] = 400
    return hu


def labels(shape=SHAPE):
    "The femora, and a gluteus behind each; the patient's left is where x is large."
    z, y, x = np.indices(shape)
    lab = np.zeros(shape, np.uint8)
    for side, at in (('right', 8), ('left', 23)):
        lab[(y >= 17) & (y < 20) & (abs(x - at) < 5) & (z > 1) & (z < 6)] = TOTALSEGMENTATOR[f'gluteus_maximus_{side}']
        lab[(x - at)**2 + (y - 12)**2 < 16] = TOTALSEGMENTATOR[f'femur_{side}']
    return lab


GRID = dict(spacing=(1., 1., 2.), origin=(-15.5, -12., 0.))


def ct_volume(hu=None, **grid): return Volume(body() if hu is None else hu, **GRID | grid)
def label_volume(lab=None, **grid): return Volume(labels() if lab is None else lab, kind='labels', **GRID | grid)
def ct_file(folder, hu=None, name='ct.nii', **grid): return write_volume(Path(folder)/name, ct_volume(hu, **grid))
def label_file(folder, lab=None, name='seg.nii.gz', **grid): return write_volume(Path(folder)/name, label_volume(lab, **grid))


JPEG_LS = base64.b64decode( # one slice, 24 x 32 x 16 bit, of `jpeg_ls_slice`, by CharLS
    '/9j/9wALCwAYACABAREA/9oACAEBAAAAAC+WOMZfpmZlcmZu1bbli23a1tU0kn4KqUoPhRTM8tmUPhTMwbEumRmdVmYNiszBsVmZxWZg2IzM9QNkZmbRmYNkzMGyZmaTMwbKfTMwbJ3Y'
    'gAAAAAfXTSSflRUoAAAAAfZjZC7u9C6aFmDZC7sGwAAAAA+km7uQu7PAAAAAD8cAAAAA/PzMG0LsojNQszBtCAAAAAPqJOG0Lu7UKcAAAAA+uAbIXQu7hcB9C7uxC4dPIXQu7hdF3SgA'
    'AAAH6I87u4XRUi7uF0XPSyxF3cLoO7hdSOtAbDsQd0lcLoO6Bm9B3daDu4XQd04O0Hdz6rQZmDYEXdwug7utB3YNgq7uF55Qd3dBAqzheDu4Xg7uyCcDcLwdSDuF4OgirIO7heDu4Xg6'
    'cDZB3c6oXg7uhuCDu7IO7huDu56C0HZmViGZg3BmOwbh3dkMzBueBO4bhaHd2Q6CLC8O7heHd2Q6sCC8O6yuG4d0EcQ7sG4d3C8O6sIId3C4H4d3C4AAAAAH54AAAAB9d3ZDu4Xh3cLA'
    'AAAAPrqu7shaHdwvDoGAAAAAPsx5+Hd1Q7sGwAAAAD7SjuF4dyu6od2DYDznq+4Xh3dUAAAAAD7S3C8O7hqheHd1Q6BgGyfLw7sG4AACzp1R3cNzmO7heO7o2PMgRAiA0NwTQRBIXju6'
    'o7ozBuO7huO7qjuwbju4bju5XVGZg3Hdg3Hd1R2YNx3cNgD/2Q==')


def jpeg_ls_slice():
    "The picture that JPEG_LS holds."
    y, x = np.indices((24, 32))
    return ((np.hypot(y - 12, x - 16) < 9)*1064 + 24 + (3*x + 5*y) % 17).astype(np.uint16)


def encode(stored, syntax): # bytes of one slice, uint16
    "Pixel data in a transfer syntax."
    if syntax == JPEG2000Lossless:
        from PIL import Image
        stream = io.BytesIO()
        Image.fromarray(stored).save(stream, 'JPEG2000', irreversible=False, no_jp2=True)
        return encapsulate([stream.getvalue()])
    if syntax == JPEGLSLossless:
        assert (stored == jpeg_ls_slice()).all()
        return encapsulate([JPEG_LS])
    return stored.tobytes()


def dicom_series(folder, hu=None, step=2., syntax=ExplicitVRLittleEndian, tilt_mm=0., each=None, series=None, positions=None, **tags):
    "A CT series; `each(index, dataset)` may spoil a slice, and None for a tag removes it."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hu = body() if hu is None else hu
    series = series or generate_uid()
    for i, picture in enumerate(hu):
        d = pydicom.Dataset()
        d.file_meta = FileMetaDataset()
        d.file_meta.MediaStorageSOPClassUID, d.file_meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        d.file_meta.TransferSyntaxUID = syntax
        d.SOPClassUID, d.SOPInstanceUID, d.SeriesInstanceUID = CTImageStorage, d.file_meta.MediaStorageSOPInstanceUID, series
        d.PatientName, d.PatientID, d.PatientBirthDate = 'Doesworth^Janequist', 'MRN-4711-0815', '19500101'
        d.Modality, d.SeriesNumber, d.InstanceNumber = 'CT', 3, i + 1
        d.Manufacturer, d.ManufacturerModelName, d.KVP, d.ConvolutionKernel, d.SliceThickness = 'Maker', 'One', 120, 'B30', step
        d.ImagePositionPatient = [-15.5, -12. + tilt_mm*i, positions[i] if positions else step*i]
        d.ImageOrientationPatient, d.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
        d.Rows, d.Columns = picture.shape
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, 'MONOCHROME2'
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 0
        d.RescaleSlope, d.RescaleIntercept, d.RescaleType = 1, -1024, 'HU'
        d.PixelData = encode((picture.astype(int) + 1024).astype(np.uint16), syntax)
        for k, v in tags.items():
            if v is None: delattr(d, k)
            else: setattr(d, k, v)
        if each: each(i, d)
        d.save_as(folder/f'{series[-6:]}_{i:03d}.dcm', enforce_file_format=True)
    return folder
