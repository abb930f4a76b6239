"""Bad input to `bmdx measure`: each kind ends in one line that names file, value, expectation and remedy, in exit code 2, and in no output.

Every scan here is made for the test and broken in one way; the table gives the words without which the line would not help."""
import argparse
import gzip
import re
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless
from scans import body, ct_file, ct_volume, dicom_series, jpeg_ls_slice, label_file, label_volume, labels

from bmd_xray.measure import add_arguments, run_from_args
from bmd_xray.volume import InputWarning, TOTALSEGMENTATOR, read_labels, read_volume, write_volume


def measure(*arguments):
    "The command, in this process."
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run_from_args(parser.parse_args([str(a) for a in arguments]))


def patched(path, at, form, *values):
    "A file with a few header bytes overwritten."
    raw = bytearray(path.read_bytes())
    struct.pack_into(form, raw, at, *values)
    path.write_bytes(raw)
    return path


def cut(path, share=.6):
    "A file that breaks off."
    path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])
    return path


def replaced(path, old, new):
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new))
    return path


def text(path, words='not a scan'):
    path.write_text(words)
    return path


def stack(path, array, vector=False):
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path))
    return path


def without(folder, *indices):
    "A series with slices taken away."
    for i, f in enumerate(sorted(folder.iterdir())):
        if i in indices: f.unlink()
    return folder


def with_copy(folder):
    first = sorted(folder.iterdir())[2]
    (folder/'copy.dcm').write_bytes(first.read_bytes())
    return folder


def with_file(folder, words=b'', name='000.dcm'):
    (folder/name).write_bytes(words)
    return folder


def two_series(folder):
    dicom_series(folder)
    return dicom_series(folder)


def cut_slice(folder, share):
    cut(sorted(folder.iterdir())[3], share)
    return folder


def sheared(path):
    "A NIfTI whose sform leans by 10 degrees, as a tilted gantry leaves it."
    patched(path, 252, '<2h', 0, 1)
    return patched(path, 280, '<12f', 1, 0, 0, 0, 0, 1, 2*np.tan(np.radians(10)), 0, 0, 0, 2, 0)


at3 = lambda tag, value: lambda i, d: setattr(d, tag, value) if i == 3 else None
noise = np.random.default_rng(0)
half = np.zeros((8, 24, 16), np.int16)

CT = dict( # what is broken: how to make it, words of the error
    missing_path=(lambda f: f/'none.nii', 'none.nii: got nothing there'),
    empty_file=(lambda f: with_file(f, name='empty.nii')/'empty.nii', 'empty file .0 bytes.'),
    no_image=(lambda f: text(f/'notes.txt'), 'no image, expected a DICOM'),
    text_named_nifti=(lambda f: text(f/'a.nii'), 'no NIfTI-1 header'),
    text_named_gzip=(lambda f: text(f/'a.nii.gz'), 'broken gzip'),
    text_named_mha=(lambda f: text(f/'a.mha'), 'cannot be read'),
    truncated_nifti=(lambda f: cut(ct_file(f)), r'truncated file, \d+ bytes, expected \d+ bytes'),
    truncated_gzip=(lambda f: cut(ct_file(f, name='ct.nii.gz')), 'truncated file|broken gzip'),
    truncated_mha=(lambda f: cut(ct_file(f, name='ct.mha')), 'cannot be read'),
    truncated_nrrd=(lambda f: cut(ct_file(f, name='ct.nrrd')), 'cannot be read'),
    mhd_without_data=(lambda f: text(f/'a.mhd', 'ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementSpacing = 1 1 1\n'
                                     'ElementType = MET_SHORT\nElementDataFile = a.raw\n'), 'cannot be read'),
    zero_spacing_nifti=(lambda f: patched(ct_file(f), 80, '<f', 0.), r'spacing \(0.0, 1.0, 2.0\) mm, expected three numbers above 0'),
    negative_spacing_nifti=(lambda f: patched(ct_file(f), 88, '<f', -2.), r'spacing \(1.0, 1.0, -2.0\)'),
    nan_spacing_nifti=(lambda f: patched(ct_file(f), 80, '<f', float('nan')), r'spacing \(nan'),
    zero_spacing_mha=(lambda f: replaced(ct_file(f, name='ct.mha'), b'Spacing = 1 1 2', b'Spacing = 0 1 2'), 'spacing 0 1 2 mm'),
    negative_spacing_mha=(lambda f: replaced(ct_file(f, name='ct.mha'), b'Spacing = 1 1 2', b'Spacing = -1 1 2'), 'spacing -1 1 2 mm'),
    non_square_nifti=(lambda f: ct_file(f, spacing=(1, 1.5, 2)), 'pixels of 1 x 1.5 mm, expected square pixels: resample'),
    no_orientation=(lambda f: patched(ct_file(f), 252, '<2h', 0, 0), 'no orientation .*left hip may be the right'),
    sheared_nifti=(lambda f: sheared(ct_file(f)), 'sheared axes .10.0 deg.*gantry tilt'),
    two_d=(lambda f: stack(f/'a.mha', body()[0]), '32 x 24 voxels, expected a 3-D volume'),
    one_slice=(lambda f: stack(f/'a.nii', body()[:1]), '32 x 24 x 1 voxels, expected a 3-D volume'),
    four_d=(lambda f: stack(f/'a.nii', np.stack([body()]*3)), '32 x 24 x 8 x 3 voxels, .*time points'),
    rgb_mha=(lambda f: stack(f/'a.mha', np.stack([body().astype(np.uint8)]*3, -1), vector=True), '3 values a voxel'),
    rgb_nifti=(lambda f: stack(f/'a.nii', np.stack([body().astype(np.uint8)]*3, -1), vector=True), 'RGB'),
    nan=(lambda f: ct_file(f, np.where(body() == 400, np.nan, body().astype(np.float32))), r'\d+ voxels of NaN or infinity'),
    infinity=(lambda f: ct_file(f, np.where(body() == 400, np.inf, body().astype(np.float32))), 'voxels of NaN or infinity'),
    unscaled=(lambda f: ct_file(f, body() + 1024), 'values 24 to 1424, none below 0, expected HU.*rescale'),
    below_physics=(lambda f: ct_file(f, noise.integers(-9000, 3000, body().shape)), 'expected nothing below air'),
    above_physics=(lambda f: ct_file(f, body().astype(np.int32)*1000), 'HU, expected at most|nothing below air'),
    eight_bit=(lambda f: ct_file(f, (body() > 0).astype(np.uint8)*200), '8-bit values'),
    constant=(lambda f: ct_file(f, np.full((8, 24, 32), 7, np.int16)), '7 in every voxel'),
    dicom_missing=(lambda f: without(dicom_series(f/'d'), 3, 4), '2 missing slices, 6.00 mm .*expected 2.00 mm everywhere: export the whole series'),
    dicom_duplicate=(lambda f: with_copy(dicom_series(f/'d')), r'1 duplicate slices, the first at 4.00 mm \(.*copy.dcm.*expected each place once'),
    dicom_uneven=(lambda f: dicom_series(f/'d', positions=[0, 2, 4, 6, 8.7, 10.7, 12.7, 14.7]),
                  r'non-uniform slice spacing, 2.700 mm at 6.00 mm .*expected 2.000 mm'),
    dicom_tilted=(lambda f: dicom_series(f/'d', tilt_mm=2*np.tan(np.radians(12))), 'gantry tilt 12.0 deg, expected 0'),
    dicom_tilt_tag=(lambda f: dicom_series(f/'d', GantryDetectorTilt=-8), 'gantry tilt 8.0 deg'),
    dicom_two_series=(lambda f: two_series(f/'d'), r'2 series \(8 \+ 8 slices\), expected one'),
    dicom_empty_file=(lambda f: with_file(dicom_series(f/'d')), '000.dcm: got an empty file'),
    dicom_truncated=(lambda f: cut_slice(dicom_series(f/'d'), .7), '_003.dcm: got pixel data that cannot be read, expected a whole slice'),
    dicom_truncated_jpeg=(lambda f: cut_slice(dicom_series(f/'d', syntax=JPEG2000Lossless), .8), '_003.dcm: got pixel data that cannot be read|breaks off'),
    dicom_no_slices=(lambda f: with_file(f, b'hello', 'readme.txt'), '1 files, none of them a DICOM slice'),
    dicom_one_slice=(lambda f: dicom_series(f/'d', body()[:1]), '1 slice, expected a series'),
    dicom_rgb=(lambda f: dicom_series(f/'d', PhotometricInterpretation='RGB', SamplesPerPixel=3), 'RGB pixels, expected MONOCHROME2'),
    dicom_mr=(lambda f: dicom_series(f/'d', Modality='MR'), 'modality MR, expected CT'),
    dicom_no_rescale=(lambda f: dicom_series(f/'d', RescaleSlope=None), 'no RescaleSlope and RescaleIntercept'),
    dicom_other_units=(lambda f: dicom_series(f/'d', RescaleType='Z_EFF'), 'RescaleType Z_EFF, expected HU'),
    dicom_no_position=(lambda f: dicom_series(f/'d', ImagePositionPatient=None), 'ImagePositionPatient None'),
    dicom_zero_spacing=(lambda f: dicom_series(f/'d', PixelSpacing=[0, 0]), 'PixelSpacing 0.0 x 0.0 mm, expected numbers above 0'),
    dicom_non_square=(lambda f: dicom_series(f/'d', PixelSpacing=[1, 1.5]), 'pixels of 1.5 x 1 mm, expected square'),
    dicom_mixed_spacing=(lambda f: dicom_series(f/'d', each=at3('PixelSpacing', [.9, .9])), 'different PixelSpacing'),
    dicom_multiframe=(lambda f: dicom_series(f/'d', NumberOfFrames=20), '20 frames in one file'),
    dicom_bent_axes=(lambda f: dicom_series(f/'d', ImageOrientationPatient=[1, 0, 0, .2, 1, 0]), 'expected two unit vectors at right angles'),
    dicom_unscaled=(lambda f: dicom_series(f/'d', RescaleIntercept=0), 'none below 0, expected HU'),
)

LABELS = dict(
    missing_path=(lambda f: f/'none.nii', 'none.nii: got nothing there'),
    truncated=(lambda f: cut(label_file(f, name='seg.nii')), 'truncated file'),
    other_place=(lambda f: label_file(f, origin=(200, 0, 0)), 'no overlap with the CT'),
    wrong_shape=(lambda f: label_file(f, labels()[:4]), r'cover 50 % of the CT \(labels \(4, 24, 32\).*CT \(8, 24, 32\)'),
    wrong_geometry=(lambda f: label_file(f, direction=[[0, -1, 0], [1, 0, 0], [0, 0, 1]]), 'cover|no overlap'),
    the_ct_itself=(lambda f: ct_file(f, name='again.nii'), 'expected a label map: give the segmentation, not the CT'),
    fractions=(lambda f: label_file(f, labels()*np.float32(.01)), 'not all whole numbers'),
    empty=(lambda f: label_file(f, np.zeros_like(labels())), 'no labelled voxel'),
    no_names=(lambda f: label_file(f, np.where(labels() > 0, labels() + 150, 0).astype(np.uint8)), 'without a name.*names='),
    nan=(lambda f: label_file(f, np.where(labels() > 0, np.nan, 0).astype(np.float32)), 'voxels of NaN'),
    mirrored=(lambda f: label_file(f, labels()[:, :, ::-1]), 'femur_left at x = .* to the right of femur_right.*mirrored'),
    shifted_off_bone=(lambda f: label_file(f, np.roll(labels(), 9, 1)), 'bones of .* HU on average'),
    masks_of_two_scans=(lambda f: [label_file(f/'m', labels() == 75, 'femur_left.nii.gz').parent,
                                   label_file(f/'m', (labels() == 76)[:4], 'femur_right.nii.gz')][0],
                        r'femur_right.nii.gz: got shape \(4, 24, 32\), another grid'),
    empty_folder=(lambda f: [(f/'m').mkdir(), f/'m'][1], 'no image files'),
)

OPTIONS = dict(
    out_is_a_file=(lambda f: ['--out', text(f/'a.txt')], 'a.txt: got a file, expected a folder'),
    out_is_taken=(lambda f: ['--out', with_file([(f/'old').mkdir(), f/'old'][1], b'x')], 'holds other things'),
    out_unwritable=(lambda f: ['--out', '/dev/null/result'], 'expected a place to write'),
    calibration_words=(lambda f: ['--calibration', 'high,low,phantom'], 'expected slope,intercept,source'),
    calibration_inverse=(lambda f: ['--calibration', '1.38,0,phantom'], 'calibration slope: got 1.38 .*its inverse is 0.725'),
    calibration_swapped=(lambda f: ['--calibration=-3,.72,phantom'], 'calibration slope: got -3'),
    calibration_nan=(lambda f: ['--calibration', 'nan,0,phantom'], 'calibration slope: got nan'),
    calibration_without_source=(lambda f: ['--calibration', '.72,-3,'], 'calibration source: got nothing'),
    calibration_not_json=(lambda f: ['--calibration', text(f/'c.json', '{')], 'c.json.*expected JSON'),
    calibration_lacks=(lambda f: ['--calibration', text(f/'c.json', '{"slope": 0.7}')], 'c.json.*intercept'),
    landmarks_missing=(lambda f: ['--landmarks', f/'none.json'], 'none.json'),
    landmarks_broken=(lambda f: ['--landmarks', text(f/'l.json', '{"left": {"head_centre": [0, 0, 0]}}')], 'neck_centre'),
    landmarks_no_side=(lambda f: ['--landmarks', text(f/'l.json', '{"middle": {}}')], 'expected ..left'),
    unknown_reference=(lambda f: ['--reference', 'nobody'], 'nhanes3'),
    unknown_names=(lambda f: ['--names', 'nobody'], 'expected one of totalsegmentator'),
)


def refused(tmp_path, capsys, says, ct=None, lab=None, options=()):
    "Run and check: one line, exit code 2, nothing left."
    files, out = tmp_path/'files', tmp_path/'out'
    files.mkdir(exist_ok=True)
    ct, lab = ct or ct_file(files, name='good.nii'), lab or label_file(files, name='good_seg.nii.gz')
    before = sorted(tmp_path.rglob('*'))
    capsys.readouterr()
    assert measure(ct, '--labels', lab, '--out', out, *options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith('warning: ')]
    assert len(errors) == 1 and errors[0].startswith('error: '), errors
    assert re.search(says, errors[0]), f'{says!r} not in {errors[0]!r}'
    assert re.search(': got .*|, expected |: expected ', errors[0]) and 'Traceback' not in errors[0]
    assert sorted(tmp_path.rglob('*')) == before # no output, no temporary folder


@pytest.mark.parametrize('kind', CT)
def test_bad_ct(kind, tmp_path, capsys):
    (tmp_path/'files').mkdir()
    make, says = CT[kind]
    folder = tmp_path/'files' if 'no_slices' not in kind else tmp_path/'files'/'d'
    folder.mkdir(exist_ok=True)
    ct = make(folder)
    refused(tmp_path, capsys, says, ct=ct, lab=label_file(tmp_path, name='seg.nii.gz'))


@pytest.mark.parametrize('kind', LABELS)
def test_bad_labels(kind, tmp_path, capsys):
    (tmp_path/'files').mkdir()
    make, says = LABELS[kind]
    refused(tmp_path, capsys, says, lab=make(tmp_path/'files'))


@pytest.mark.parametrize('kind', OPTIONS)
def test_bad_options(kind, tmp_path, capsys):
    (tmp_path/'files').mkdir()
    make, says = OPTIONS[kind]
    refused(tmp_path, capsys, says, options=make(tmp_path/'files'))


def test_the_good_scan_passes(tmp_path, capsys):
    "The scan that the tables break is right when it is whole, in every format and transfer syntax."
    scans = [ct_file(tmp_path, name=f'ct{s}') for s in ('.nii', '.nii.gz', '.mha', '.nrrd')]
    scans += [dicom_series(tmp_path/'plain'), dicom_series(tmp_path/'j2k', syntax=JPEG2000Lossless)]
    scans.append(sorted((tmp_path/'plain').iterdir())[5]) # one file stands for its series
    lab = label_file(tmp_path)
    for i, ct in enumerate(scans):
        assert measure(ct, '--labels', lab, '--out', tmp_path/f'out{i}') == 0, ct
        assert (read_volume(ct).array == body()).all() and read_volume(ct).same_grid(ct_volume())
        assert 'warning' not in capsys.readouterr().err
    tables = {(tmp_path/f'out{i}'/'measure.csv').read_text() for i in range(len(scans))}
    assert len(tables) == 1 and 'gluteus_maximus,left' in tables.pop()


def test_jpeg_ls(tmp_path):
    picture = jpeg_ls_slice()
    folder = dicom_series(tmp_path/'jls', np.stack([picture.astype(int) - 1024]*3), syntax=JPEGLSLossless)
    assert (read_volume(folder).array == picture.astype(int) - 1024).all()


def test_slices_in_any_order_and_direction(tmp_path):
    "File names say nothing: a series stored downwards, feet first or in random order reads the same."
    order = np.random.default_rng(1).permutation(8)
    for name, places in (('down', list(range(7, -1, -1))), ('random', order.tolist())):
        folder = dicom_series(tmp_path/name, body()*1 + np.arange(8, dtype=np.int16)[:, None, None], positions=[2*p for p in places])
        assert (read_volume(folder).array[:, 0, 0] + 1000 == np.argsort(places)).all()
    rows_up = dicom_series(tmp_path/'rows', body()[:, ::-1], ImageOrientationPatient=[1, 0, 0, 0, -1, 0],
                           each=lambda i, d: setattr(d, 'ImagePositionPatient', [-15.5, 11., 2.*i]))
    assert (read_volume(rows_up).array == body()).all() and read_volume(rows_up).same_grid(ct_volume())


WARNED = dict( # odd, but right: words of the warning
    thickness=(lambda f: dicom_series(f, SliceThickness=5), 'SliceThickness 5 mm, but the slices lie 2 mm apart'),
    contrast=(lambda f: dicom_series(f, ContrastBolusAgent='APPLIED'), 'contrast medium'),
    blank_uid=(lambda f: dicom_series(f, SeriesInstanceUID=''), 'SeriesInstanceUID is blank'),
    stray_file=(lambda f: with_file(dicom_series(f), b'hello', 'notes.txt'), '1 other files that are no CT slices left out'),
    scout=(lambda f: [dicom_series(f, body()[:1], ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER']), dicom_series(f)][1], '1 other files'),
)


@pytest.mark.parametrize('kind', WARNED)
def test_warned(kind, tmp_path):
    make, says = WARNED[kind]
    with pytest.warns(InputWarning, match=says): assert (read_volume(make(tmp_path/'d')).array == body()).all()


def test_padding_and_ringing(tmp_path):
    hu = body()
    hu[:, :2], hu[0, 5, 0], hu[0, 5, 1] = -3024, -1207, 3382
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        read = read_volume(ct_file(tmp_path, hu)).array
    said = [str(w.message).rpartition('ct.nii: ')[2] for w in caught]
    assert [[word in m for word in ('padding', 'ringing', 'above the 12-bit')] for m in said] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert (read[:, :2] == -1000).all() and (read[:, 2:] == hu[:, 2:]).all()


def test_labels_by_header(tmp_path):
    "Flipped rows, another resolution and a folder of masks come out where they lie."
    ct, truth = ct_volume(), labels()
    flipped = label_volume(truth[:, ::-1], origin=(-15.5, 11., 0), direction=np.diag([1., -1, 1]))
    with pytest.warns(InputWarning, match='flipped rows'): assert (read_labels(write_volume(tmp_path/'a.nii.gz', flipped), ct).array == truth).all()
    fine = label_volume(truth.repeat(2, 0).repeat(2, 1).repeat(2, 2), spacing=(.5, .5, 1), origin=(-15.75, -12.25, -.5))
    with pytest.warns(InputWarning, match='another grid'): assert (read_labels(write_volume(tmp_path/'b.nii.gz', fine), ct).array == truth).all()
    for name in ('femur_left', 'gluteus_maximus_right'): label_file(tmp_path/'masks', truth == TOTALSEGMENTATOR[name], f'{name}.nii.gz')
    masks = read_labels(tmp_path/'masks', ct)
    assert all((masks.mask(n) == (truth == TOTALSEGMENTATOR[n])).all() for n in ('femur_left', 'gluteus_maximus_right')) and len(masks.names) == 2


def test_no_identifier_leaves(tmp_path):
    "Neither the patient's name and number in the header nor the path of the scan reach any output."
    ct = dicom_series(tmp_path/'Janequist_Doesworth_4711-0815')
    lab = label_file(tmp_path/'Janequist_Doesworth_4711-0815_seg')
    assert measure(ct, '--labels', lab, '--out', tmp_path/'out', '--calibration', '.72,-3,phantom of 2024') == 0
    for f in (p for p in (tmp_path/'out').rglob('*') if p.is_file()):
        assert not re.search(rb'Doesworth|Janequist|4711-0815|19500101', f.read_bytes()), f
    from bmd_xray.core import InputError
    with pytest.raises(InputError, match='identify a patient'):
        write_volume(tmp_path/'x.nii', ct_volume(provenance=dict(PatientID='4711')))


def test_a_second_run_replaces_the_first_or_leaves_it(tmp_path):
    ct, lab, out = ct_file(tmp_path), label_file(tmp_path), tmp_path/'out'
    assert measure(ct, '--labels', lab, '--out', out) == 0
    (out/'stale.txt').write_text('x')
    first = (out/'measure.csv').read_bytes()
    assert measure(tmp_path/'none.nii', '--labels', lab, '--out', out) == 2 and (out/'measure.csv').read_bytes() == first
    assert measure(ct, '--labels', lab, '--out', out) == 0 and not (out/'stale.txt').exists() and (out/'measure.csv').read_bytes() == first
    assert [p for p in tmp_path.iterdir() if p.name.startswith('.')] == []


def test_exit_code_of_the_process(tmp_path):
    "A fresh interpreter says one line and exits with 2; gzip noise is a scan's fault, not ours."
    bad = tmp_path/'noise.nii.gz'
    bad.write_bytes(gzip.compress(bytes(500)))
    code = 'import argparse, sys; from bmd_xray.measure import *; p = argparse.ArgumentParser(); add_arguments(p); sys.exit(run_from_args(p.parse_args()))'
    r = subprocess.run([sys.executable, '-c', code, str(bad), '--labels', str(bad), '--out', str(tmp_path/'out')], capture_output=True, text=True)
    assert r.returncode == 2 and r.stdout == '' and r.stderr.startswith('error: ') and r.stderr.count('\n') == 1, r.stderr
