"""Real scans, where they are at hand: the folder in BMDX_REAL, or shared/real beside the repository.

The expected numbers come from the scans' own headers, from SimpleITK and numpy used directly, or from what a person sees in them;
none is a copy of an earlier result."""
import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from bmd_xray.measure import add_arguments, find_metal, run_from_args
from bmd_xray.volume import InputWarning, TOTALSEGMENTATOR, read_labels, read_volume

REAL = Path(os.environ.get('BMDX_REAL') or Path(__file__).resolve().parents[2]/'shared'/'real')
PELVIS, DICOM, SPINE = REAL/'ts_pelvis_ct', REAL/'ts_dicom_t12l1', REAL/'tptbox_l3'
pytestmark = [pytest.mark.skipif(not PELVIS.is_dir(), reason='no real scans here: BMDX_REAL names the folder that holds ts_pelvis_ct and the others'),
              pytest.mark.filterwarnings('ignore::bmd_xray.volume.InputWarning')]


def measure(ct, labels, out, *more):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run_from_args(parser.parse_args([str(ct), '--labels', str(labels), '--out', str(out), *more])) == 0
    return json.loads((out/'measure.json').read_text())


@pytest.fixture(scope='module')
def pelvis(tmp_path_factory):
    out = tmp_path_factory.mktemp('pelvis')/'out'
    return out, measure(PELVIS/'example_ct.nii.gz', PELVIS/'example_seg_fast_force_split.nii.gz', out)


def rows(report): return {(r['structure'], r['side']): r for r in report['structures']}


def test_pelvis_numbers_against_simpleitk(pelvis):
    ct, seg = (sitk.ReadImage(str(PELVIS/n)) for n in ('example_ct.nii.gz', 'example_seg_fast_force_split.nii.gz'))
    statistics = sitk.LabelStatisticsImageFilter()
    statistics.Execute(ct, seg)
    hu, lab, found = sitk.GetArrayFromImage(ct), sitk.GetArrayFromImage(seg), rows(pelvis[1])
    for stem in ('gluteus_maximus', 'gluteus_medius', 'gluteus_minimus', 'iliopsoas', 'femur', 'hip'):
        for side in ('left', 'right'):
            v, r = TOTALSEGMENTATOR[f'{stem}_{side}'], found[stem, side]
            assert r['volume_cm3'] == pytest.approx(statistics.GetCount(v)*3.**3/1000)
            assert r['mean_hu'] == pytest.approx(statistics.GetMean(v), abs=1e-3)
            if r['tissue'] == 'muscle':
                h = hu[lab == v].astype(float)
                pieces = 1.03091 + 1.0297e-3*h, 1.018 + .893e-3*h, 1.03 + 0*h, 1.003 + 1.169e-3*h
                density = np.select([h < -98, h < 14, h < 23, h < 100], pieces, 1.017 + .592e-3*h)
                assert r['lean_mass_g'] == pytest.approx((np.clip((h + 30)/60, 0, 1)*density).sum()*.027, rel=1e-5)


def test_pelvis_refusals_by_name(pelvis):
    reasons = {b['side']: [r['reason'] for r in b['refused']] for b in pelvis[1]['bmd']}
    assert set(reasons['left']) == {'cut above the lesser trochanter', 'metal in the femur', 'no calibration', 'no landmarks'}
    assert set(reasons['right']) == set(reasons['left']) - {'metal in the femur'}
    assert not any('abmd' in b for b in pelvis[1]['bmd'])
    page = (pelvis[0]/'index.html').read_text()
    assert all(reason in page for reason in reasons['left']) and 'BMD refused' in page and 'cut, lower bound' in page
    assert str(REAL) not in page and '<img' in page and 'src="http' not in page


def test_pelvis_cut_and_absent(pelvis):
    found = rows(pelvis[1])
    below = {'gluteus_maximus', 'iliopsoas', 'femur', 'hip'} # a person sees these leave the scan at the bottom
    for (stem, _), r in found.items():
        if stem in below: assert r['state'] == 'cut, lower bound' and r['cut'] == ['caudal']
        if stem in ('gluteus_medius', 'gluteus_minimus'): assert r['state'] == 'complete'
        if stem in ('iliacus', 'obturator_externus', 'pectineus'): assert r['state'] == 'absent' and 'volume_cm3' not in r
    assert found['iliopsoas', 'left']['volume_cm3'] > 100 # measured under its own name, and not taken for an iliacus


def test_pelvis_metal():
    "529 voxels above 2000 HU, all in the left femur."
    ct = read_volume(PELVIS/'example_ct.nii.gz')
    metal = find_metal(ct)
    assert metal.sum() == 529 and (metal == (ct.array > 2000)).all()
    seg = read_labels(PELVIS/'example_seg_fast_force_split.nii.gz', ct)
    assert (seg.array[metal] == TOTALSEGMENTATOR['femur_left']).all()
    assert ct.to_mm(np.argwhere(metal)[:, ::-1])[:, 0].mean() > 0 # the patient's left, by the header


def test_pelvis_pictures_hold_the_mass(pelvis):
    "The sum over a muscle's projection is its lean mass, and the liver's side of the patient is the film's left."
    pictures, found = np.load(pelvis[0]/'drr.npz'), rows(pelvis[1])
    area = float(pictures['pixel_mm'])**2/100
    for stem in ('gluteus_maximus', 'gluteus_medius', 'gluteus_minimus', 'iliopsoas'):
        for side in ('left', 'right'):
            p = pictures[f'{stem}_{side}']
            assert p.sum()*area == pytest.approx(found[stem, side]['lean_mass_g'], rel=.001)
            col = (p.sum(0)*np.arange(p.shape[1])).sum()/p.sum()
            assert (col > p.shape[1]/2) == (side == 'left')
            assert (pelvis[0]/'drr'/f'{stem}_{side}.png').stat().st_size > 500


def test_pelvis_mirrored_by_array_and_header(tmp_path, pelvis):
    "The same patient stored with columns reversed, header and all: the same numbers. With the header left alone: refused."
    def flipped(name, honest):
        image = sitk.ReadImage(str(PELVIS/name))
        turned = sitk.Flip(image, (True, False, False))
        if not honest: turned.CopyInformation(image)
        sitk.WriteImage(turned, str(tmp_path/f'{honest}_{name}'))
        return tmp_path/f'{honest}_{name}'
    names = 'example_ct.nii.gz', 'example_seg_fast_force_split.nii.gz'
    again = measure(*[flipped(n, True) for n in names], tmp_path/'out')
    for key, r in rows(pelvis[1]).items():
        if r['state'] != 'absent': assert rows(again)[key]['volume_cm3'] == r['volume_cm3'] and rows(again)[key]['mean_hu'] == pytest.approx(r['mean_hu'])
    ct, labels = (flipped(n, False) for n in names)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run_from_args(parser.parse_args([str(ct), '--labels', str(labels), '--out', str(tmp_path/'wrong')])) == 2 and not (tmp_path/'wrong').exists()


def test_dicom_reads_right_and_warns():
    with pytest.warns(InputWarning) as caught: ct = read_volume(DICOM/'example_ct_dicom')
    said = ' / '.join(str(w.message) for w in caught)
    assert 'SliceThickness 3 mm, but the slices lie 2 mm apart' in said and 'SeriesInstanceUID is blank' in said and 'contrast' in said
    assert ct.shape == (20, 512, 512) and ct.spacing == pytest.approx((.9765625, .9765625, 2.))
    files = [sitk.ReadImage(str(f)) for f in (DICOM/'example_ct_dicom').iterdir()]
    for image in files: # every slice where its own header puts it, bit for bit
        z = ct.to_index(image.GetOrigin())[2]
        assert z == pytest.approx(round(z), abs=1e-6) and (ct.array[round(z)] == sitk.GetArrayFromImage(image)[0]).all()


def test_dicom_labels_with_flipped_rows():
    "By the header the vertebrae lie on bone and the liver on the right; by array order they do not."
    ct = read_volume(DICOM/'example_ct_dicom')
    with pytest.warns(InputWarning, match='flipped rows'): seg = read_labels(DICOM/'example_seg_dicom.nii.gz', ct)
    stored = sitk.GetArrayFromImage(sitk.ReadImage(str(DICOM/'example_seg_dicom.nii.gz')))
    spine = [TOTALSEGMENTATOR['vertebrae_T12'], TOTALSEGMENTATOR['vertebrae_T11']]
    assert ct.array[np.isin(seg.array, spine)].mean() > 200 > ct.array[np.isin(stored, spine)].mean() + 100
    side = {n: ct.to_mm(np.argwhere(seg.mask(n))[:, ::-1])[:, 0].mean() for n in ('liver', 'spleen')}
    assert side['liver'] < 0 < side['spleen']
    assert 60 < ct.array[seg.mask('liver')].mean() < 140 # enhanced liver


def test_dicom_measured_without_a_hip(tmp_path):
    report = measure(DICOM/'example_ct_dicom', DICOM/'example_seg_dicom.nii.gz', tmp_path/'out')
    assert [[r['reason'] for r in b['refused']] for b in report['bmd']] == [['no proximal femur', 'no calibration']]*2
    assert rows(report)['autochthon', 'left']['cut'] == ['caudal', 'cranial'] and rows(report)['gluteus_maximus', 'left']['state'] == 'absent'
    assert len(report['warnings']) == 4 and report['scan']['contrast'] and not any(str(REAL) in w for w in report['warnings'])


def test_spine_stored_in_another_order():
    "Axes PIR on disk: turned to LPS, voxel by voxel where the header puts them."
    image = sitk.ReadImage(str(SPINE/'sub-ct_label-22_ct.nii.gz'))
    ct = read_volume(SPINE/'sub-ct_label-22_ct.nii.gz')
    assert ct.provenance['axes'] == 'PIR' and ct.axes == 'LPS'
    for index in np.random.default_rng(0).integers(0, image.GetSize(), (50, 3)).tolist():
        x, y, z = np.round(ct.to_index(image.TransformIndexToPhysicalPoint(index))).astype(int)
        assert ct.array[z, y, x] == image.GetPixel(index)
    names = dict(vertebrae_L2=21, vertebrae_L3=22, vertebrae_L4=23)
    seg = read_labels(SPINE/'sub-ct_seg-vert_label-22_msk.nii.gz', ct, names)
    heights = [ct.to_mm(np.argwhere(seg.mask(n))[:, ::-1])[:, 2].mean() for n in names]
    assert heights == sorted(heights, reverse=True) and ct.array[seg.mask('vertebrae_L3')].mean() > 150
