"""Chest patients, their films and regions, across modules: determinism, mirror, mass, landmarks, split."""
from dataclasses import replace

import numpy as np
import pytest

from bmd_xray.chest import LANDMARKS, LEVELS, LUMBAR, OTHER_SIDE, ChestAnatomy, chest_landmarks, spine_frames
from bmd_xray.chest_cohort import CHEST_COUNTS, ChestPatient, chest_split, form_chest_film, load_chest_views, lumbar_t_score, sample_chest_cohort
from bmd_xray.core import InputError
from bmd_xray.drr import render_channels
from bmd_xray.geometry import Orthographic
from bmd_xray.rois import ROI_KINDS, ROIS, crop_rois, roi_frames
from bmd_xray.thorax import CHEST_LABELS, voxelise_chest


@pytest.fixture(scope='module')
def patient(): return ChestPatient('C-0001')


@pytest.fixture(scope='module')
def upright(patient):
    "The same patient, symmetric: a straight spine, and each bone's status as its mirror image's."
    a = patient.anatomy
    status = {k: a.status[k.replace('right', 'left')] for k in a.status}
    return ChestAnatomy(a.patient_id, a.covariates, {**a.body, 'bend': [0., 0., 0.]}, status)


@pytest.fixture(scope='module')
def body(upright): return voxelise_chest(upright, 5.)


def test_a_bigger_cohort_begins_with_the_smaller():
    small, big = sample_chest_cohort(3), sample_chest_cohort(9)
    assert [p.id for p in big[:3]] == [p.id for p in small]
    for p, q in zip(small, big): assert p.anatomy == q.anatomy and p.films == q.films
    assert small[0].dxa() == big[0].dxa()


def test_another_world_is_another_patient(patient):
    other = replace(patient, seed=1)
    assert other.anatomy.body != patient.anatomy.body and other.dxa() != patient.dxa()


def test_two_sides_mirror_each_other(upright, body):
    p = chest_landmarks(upright)
    np.testing.assert_allclose(p[list(OTHER_SIDE)]*[-1, 1, 1], p, atol=1e-9)
    x = body.origin[0] + body.spacing[0]*np.arange(body.labels.shape[2])
    mineral = body.stack[..., 0].sum((0, 1))
    assert mineral[x > 0].sum() == pytest.approx(mineral[x < 0].sum(), rel=.01)  # spongy bone's texture is not mirrored
    for bone in ('clavicula', 'scapula', 'rib'):
        of = [body.mask(*[n for n in CHEST_LABELS if n.startswith(f'{bone}_{side}')]) for side in ('left', 'right')]
        assert of[0][:, :, x > 0].any() and not of[0][:, :, x < 0].any() and not of[1][:, :, x > 0].any(), bone


def test_no_mass_is_lost_between_voxels_and_projection(body):
    geometry = Orthographic(size=(120, 110), pixel=4., centre=(-180., 0.), azimuth_deg=180.)
    picture = render_channels(body.stack, body.volume('labels').affine, geometry)/10  # g/cm2
    for k, name in enumerate(('mineral', 'lean', 'fat')):
        assert picture[k].sum()*geometry.pixel_area_mm2/100 == pytest.approx(body.stack[..., k].sum()*body.voxel_cm3, rel=5e-3), name


def test_landmarks_project_to_where_the_bones_are(patient):
    "A bead in the body at each landmark leads to the film's pixel that the landmark is said to be at."
    film, size = patient.films[0], (128, 128)
    said = patient.landmarks(film, size)
    affine = np.diag([2., 2., 2., 1.])
    for i in (0, LANDMARKS.index('rib_right_7'), LANDMARKS.index('T12')):
        p = chest_landmarks(patient.anatomy)[i]
        affine[:3, 3] = p - 6.
        stack = np.zeros((7, 7, 7, 4), np.float32); stack[3, 3, 3, 0] = 1
        bead = render_channels(stack, affine, patient.geometry((512, 512)), patient.placement(film))[0][:, ::-1]
        r, c = (np.indices(bead.shape)*bead).sum((1, 2))/bead.sum()
        np.testing.assert_allclose([(r + .5)/4 - .5, (c + .5)/4 - .5], said[i], atol=.15)


def test_status_moves_bmd_of_its_own_level(patient):
    a, before = patient.anatomy, patient.lumbar_bmd(3.)
    class Denser(ChestPatient):
        @property
        def anatomy(self): return ChestAnatomy(a.patient_id, a.covariates, a.body, {**a.status, 'L2': a.status['L2'] + 1})
    after = Denser(patient.id).lumbar_bmd(3.)
    assert after['L2']/before['L2'] > 1.08
    for v in ('L1', 'L3', 'L4'): assert after[v] == before[v]


def test_lumbar_bmd_hardly_depends_on_the_grid(patient):
    fine, coarse = patient.lumbar_bmd(1.25), patient.lumbar_bmd(2.)
    for v in LUMBAR: assert coarse[v] == pytest.approx(fine[v], rel=.05)


def test_film_and_cache(patient, tmp_path, monkeypatch):
    monkeypatch.setenv('BMDX_CACHE', str(tmp_path))
    job = patient, (64, 64), 6.
    arrays, record = load_chest_views(job)
    again, record_again = load_chest_views(job)
    assert record == record_again and (arrays['basis'] == again['basis']).all() and len(list((tmp_path/'chest').iterdir())) == 1
    film = form_chest_film(arrays['basis'][0], record['films'][0])
    assert film.dtype == np.uint16 and film.max() <= 4095
    # air outside is dark, lungs are darker than the heart's side of the spine, below the diaphragm it is washed out
    assert film[4:8, :4].mean() < 400 and film[-8:, 28:36].mean() > 3000
    assert film[28:34, 16:20].mean() < film[28:34, 30:34].mean()


def test_spine_is_in_order(patient):
    z = [spine_frames(patient.anatomy)[v][2, 3] for v in LEVELS]
    assert (np.diff(z) > 0).all() and len(CHEST_LABELS) < 256


def test_split_of_the_paper():
    ids = np.repeat([f'C-{i:04d}' for i in range(1, 1669)], [2 if i <= 13 else 1 for i in range(1, 1669)])
    assert len(ids) == sum(CHEST_COUNTS) == 1681
    split = chest_split(ids)
    assert [(split == s).sum() for s in ('train', 'validation', 'test')] == [1087, 265, 329]
    assert all(len(set(split[ids == p])) == 1 for p in ids[:26])
    assert (chest_split(ids) == split).all() and (chest_split(ids, seed=1) != split).any()


def test_bad_input(patient):
    with pytest.raises(InputError, match='at least 1'): sample_chest_cohort(0)
    with pytest.raises(InputError, match='0.2 to 10 mm'): voxelise_chest(patient.anatomy, 20.)
    with pytest.raises(InputError, match='expected one of'): lumbar_t_score(np.ones(4), 'nobody')
    with pytest.raises(InputError, match=r'\(\.\.\., 4\)'): lumbar_t_score(np.ones(3))
    with pytest.raises(InputError, match='finite'): roi_frames(np.full((16, 2), np.nan), (128, 128))


def test_regions_follow_the_landmarks(patient):
    film = np.zeros((128, 128), np.uint16)
    points = patient.landmarks(patient.films[0], film.shape)
    r, c = np.rint(points[LANDMARKS.index('T12')]).astype(int)
    film[r - 1:r + 2, c - 1:c + 2] = 4000
    region = crop_rois(film, points, 32)[ROIS.index('T12')]
    assert np.abs(np.array(np.unravel_index(region.argmax(), region.shape)) - 15.5).max() <= 2
    assert sorted(n for k in ROI_KINDS.values() for n in k) == sorted(ROIS)
