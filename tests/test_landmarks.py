"""Landmarks found on masks of patients whom the shape model has not seen, against the analytic truth; refusals; a real pelvis.

What has a known answer: the truth of the synthetic patient, and what a rotation, a mirror or another voxel size must do to the result."""
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bmd_xray.cohort import sample_cohort
from bmd_xray.core import InputError
from bmd_xray.femur import POINTS
from bmd_xray.landmarks import find_landmarks
from bmd_xray.volume import Volume, read_labels, read_volume

REAL = Path(os.environ.get('BMDX_REAL') or Path(__file__).resolve().parents[2]/'shared'/'real')/'ts_pelvis_ct'


def distances(found, truth): return {n: np.linalg.norm(getattr(found.landmarks, n) - getattr(truth, n)) for n in POINTS}


def femur(scan, side):
    "The mask, cropped to the bone and two voxels around it."
    mask = scan.labels.mask(f'femur_{side}')
    index = np.argwhere(mask)
    return scan.labels.like(mask).crop([slice(max(a - 2, 0), b + 3) for a, b in zip(index.min(0), index.max(0))])


@pytest.fixture(scope='module')
def patient(): return next(p for p in sample_cohort(60)[20:] if p.covariates.kl('left') == 4) # worn, with spurs and a flattened head


@pytest.fixture(scope='module')
def scan(patient): return patient.ct('pre', 2., whole=True)


@pytest.mark.parametrize('spacing', [1.5, 3.])
def test_spacing_and_disease(patient, spacing):
    scan = patient.ct('pre', spacing, whole=True)
    for side in ('left', 'right'):
        found = find_landmarks(scan.labels, side, scan.hu)
        off = distances(found, scan.landmarks[side])
        assert off['head_centre'] < 1 and max(off.values()) < 3, (side, off)
        assert found.quality['head_radius_mm'] == pytest.approx(patient.anatomy.side(side)['head'], abs=1.2)


def test_a_short_field_of_view_at_institution_2():
    "The scan that BMD needs, from the roof to below the lesser trochanter: the same landmarks."
    p = sample_cohort(31, 2)[30]
    scan = p.ct('pre', 2.)
    for side in ('left', 'right'):
        off = distances(find_landmarks(scan.labels, side, scan.hu), scan.landmarks[side])
        assert off['head_centre'] < 1 and max(off.values()) < 3, (side, off)


def test_turned_voxels_and_mirror(scan):
    mask = femur(scan, 'left')
    upright = find_landmarks(mask, 'left').landmarks
    for seed in (5, 6):
        R = Rotation.random(rng=seed).as_matrix()
        n = int(np.linalg.norm(np.array(mask.shape)*2)/2) + 4
        grid = Volume(np.zeros((n, n, n), bool), (2.,)*3, np.full(3, -n + 1.), kind='labels')
        at = grid.to_mm(np.stack(np.meshgrid(*[np.arange(n)]*3, indexing='ij'), -1)[..., ::-1]) @ R + mask.centre
        turned = grid.like(ndimage.map_coordinates(mask.array.astype(np.float32), np.moveaxis(mask.to_index(at)[..., ::-1], -1, 0), order=1) > .5)
        found = find_landmarks(turned, 'left').landmarks
        off = [np.linalg.norm(getattr(found, n) - R @ (getattr(upright, n) - mask.centre)) for n in POINTS]
        assert np.median(off) < .5 and max(off) < 1.5, off
    mirrored = find_landmarks(mask.like(mask.array[..., ::-1]), 'right').landmarks
    for n in POINTS: assert getattr(mirrored, n) - mask.centre == pytest.approx((getattr(upright, n) - mask.centre)*[-1, 1, 1], abs=.5)
    header = Volume(mask.array[..., ::-1], mask.spacing, mask.to_mm([mask.shape[2] - 1, 0, 0]), np.diag([-1., 1, 1]), 'labels') # columns stored the other way
    for n in POINTS: assert getattr(find_landmarks(header, 'left').landmarks, n) == pytest.approx(getattr(upright, n), abs=.3)


def test_masks_that_are_a_little_wrong(scan):
    mask, truth = femur(scan, 'left'), scan.landmarks['left']
    distance = np.where(mask.array, ndimage.distance_transform_edt(mask.array) - .5, .5 - ndimage.distance_transform_edt(~mask.array))
    noise = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=mask.shape), 1)
    from_head = np.linalg.norm(np.moveaxis(np.indices(mask.shape), 0, -1)*2. - mask.to_index(truth.head_centre)[::-1]*2, axis=-1)
    near_joint = 8*noise*(from_head < 35) # a cup confused with the head: noise of 1.2 voxels there
    for what, m in dict(thin=distance > .75, thick=distance > -.75, joint=distance + near_joint > 0, hollow=mask.array & (from_head > 8)).items():
        off = distances(find_landmarks(mask.like(m), 'left'), truth)
        assert off['head_centre'] < 1.5 and np.median(list(off.values())) < 2.5 and max(off.values()) < 5, (what, off)
    crumbs = mask.array.copy()
    crumbs[-5:, :4, -4:] = True
    assert any('1 other pieces' in f for f in find_landmarks(mask.like(crumbs), 'left').flags)


def test_a_whole_femur_with_its_knee(scan):
    "Condyles at the other end are round too; the head is told from them."
    mask = femur(scan, 'left')
    low = np.argwhere(mask.array[2:4].any(0)).mean(0)
    tall = np.pad(mask.array, ((110, 0), (10, 10), (10, 10)))
    z, y, x = np.indices(tall.shape)
    y, x = y - low[0] - 10, x - low[1] - 10
    tall[20:112] |= (y**2 + x**2 < 49)[20:112]
    for sign in (-1, 1): tall |= ((z - 14)/10)**2 + ((y - 2)/13)**2 + ((x - sign*12)/11)**2 < 1
    knee = Volume(tall, mask.spacing, mask.to_mm([-10, -10, -110]), mask.direction, 'labels')
    off = distances(find_landmarks(knee, 'left'), scan.landmarks['left'])
    assert off['head_centre'] < 1 and max(off.values()) < 3, off


def test_refusals_of_wrong_masks(scan):
    whole = scan.labels
    for bone in ('hip_left', 'sacrum', 'vertebrae_L5'):
        with pytest.raises(InputError, match='unlike a proximal femur'): find_landmarks(whole.like(whole.mask(bone)), 'left')
    z, y, x = np.indices((60, 60, 60))
    ball = (z - 30)**2 + (y - 30)**2 + (x - 30)**2 < 26**2
    with pytest.raises(InputError, match='femur_left'): find_landmarks(Volume(ball, (2., 2, 2), kind='labels'), 'left')
    with pytest.raises(InputError, match='femur_left'): find_landmarks(Volume(z + y + x > 0, (2., 2, 2), kind='labels'), 'left')
    with pytest.raises(InputError, match='a right femur by its shape'): find_landmarks(femur(scan, 'right'), 'left')
    with pytest.raises(InputError, match='no voxel'): find_landmarks(whole.like(whole.array*0), 'left')
    with pytest.raises(InputError, match='a CT in HU'): find_landmarks(scan.hu, 'left')
    with pytest.raises(InputError, match='another grid'): find_landmarks(femur(scan, 'left'), 'left', scan.hu)
    with pytest.raises(InputError, match='a name femur_left'): find_landmarks(replace(whole, names={}), 'left')


def test_refusals_of_cut_femora(scan):
    mask, truth = femur(scan, 'left'), scan.landmarks['left']
    level = lambda mm: slice(max(int(round(mask.to_index(truth.lesser_trochanter)[2] - mm/2)), 0), None) # cut by the volume's end, so many mm below it
    cut = lambda mm: find_landmarks(mask.crop([level(mm), slice(None), slice(None)]), 'left')
    for mm in (-10, 8, 25):
        with pytest.raises(InputError, match='a femur cut .* mm below'): cut(mm)
    short = cut(42)
    assert 'extrapolated to 50 mm' in short.flags[0] and max(distances(short, truth).values()) < 3
    assert not any('extrapolated' in f for f in cut(60).flags)
    half = slice(0, int(mask.to_index(truth.head_centre)[2]) + 3)
    with pytest.raises(InputError, match='border cuts'): find_landmarks(mask.crop([half, slice(None), slice(None)]), 'left')
    tight = mask.crop([slice(2, -2)]*3) # no voxel to spare: nothing is cut
    assert max(distances(find_landmarks(tight, 'left'), truth).values()) < 3
    points = mask.to_mm(np.stack(np.meshgrid(*[np.arange(n) for n in mask.shape], indexing='ij'), -1)[..., ::-1])
    neck = truth.neck_centre - truth.head_centre
    with pytest.raises(InputError, match='no whole head|no neck|unlike|a surface of which'):
        find_landmarks(mask.like(mask.array & ((points - truth.neck_centre) @ neck > 0)), 'left') # sawn off


def test_after_the_operation(patient):
    after, side = patient.ct('post', 2., whole=True), patient.operative_side
    other = 'left' if side == 'right' else 'right'
    with pytest.raises(InputError, match='metal in it'): find_landmarks(after.labels, side, after.hu)
    with pytest.raises(InputError, match=f'femur_{side}'): find_landmarks(after.labels, side)
    stem = after.labels.like(after.labels.mask(f'femur_{side}') | after.labels.mask(f'prosthesis_{side}'))
    with pytest.raises(InputError, match=f'femur_{side}'): find_landmarks(stem, side)
    assert max(distances(find_landmarks(after.labels, other, after.hu), after.landmarks[other]).values()) < 3


@pytest.mark.skipif(not REAL.is_dir(), reason='no real scan here: BMDX_REAL names the folder that holds ts_pelvis_ct')
@pytest.mark.filterwarnings('ignore::bmd_xray.volume.InputWarning')
def test_a_real_pelvis():
    "Femora cut 57 mm below the top of the head, the left one with a nail."
    ct = read_volume(REAL/'example_ct.nii.gz')
    labels = read_labels(REAL/'example_seg_fast_force_split.nii.gz', ct)
    with pytest.raises(InputError, match='metal in it: .* voxels'): find_landmarks(labels, 'left', ct)
    with pytest.raises(InputError, match="a femur cut 3. mm below the head's centre"): find_landmarks(labels, 'right', ct)
    for bone in ('hip_left', 'hip_right', 'sacrum'):
        with pytest.raises(InputError, match='femur_'): find_landmarks(labels.like(labels.mask(bone)), bone.removeprefix('hip_').replace('sacrum', 'left'))
