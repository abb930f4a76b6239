"Registration against what must hold whatever the patient: invariances, honesty about failure, errors that name the remedy."
import numpy as np
import pytest

from bmd_xray.cohort import sample_cohort
from bmd_xray.core import InputError
from bmd_xray.geometry import ConeBeam, SlotScan, apply, rigid
from bmd_xray.registration import BONES, Bone, bones_of, hip_centres, initial_poses, mtre, register, register_patient, unsaturated
from bmd_xray.volume import Volume

SIZE = 64, 32
QUICK = dict(iterations=(25, 10), refinements=6)


@pytest.fixture(scope='module')
def scene():
    patient = list(sample_cohort(4, 1, 'A'))[3]
    ct, labels = patient.raw_ct('pre', 4.)
    exposure = patient.exposures()[0]
    return patient, ct, labels, exposure, [(patient.film(exposure, SIZE, 4.), exposure.geometry(SIZE))]


@pytest.fixture(scope='module')
def found(scene):
    patient, ct, labels, _, views = scene
    return register_patient(ct, labels, views, key=patient.id, **QUICK)


def test_every_bone_is_found_on_a_coarse_film(scene, found):
    patient, ct, labels, exposure, views = scene
    ready = bones_of(ct, labels)
    assert list(found) == list(BONES)
    for b, r in found.items():
        e = mtre(r.pose, patient.bone_motion(exposure, b), ready[b].points, views[0][1])
        assert e.projected < 2.5 and not r.failed, (b, e)  # pixels of 5 mm


def test_moving_the_patients_coordinates_moves_the_pose(scene, found):
    "The CT's origin is a convention: the same voxels elsewhere are found at the same place in the room."
    patient, ct, labels, _, views = scene
    shift = np.array([40., -25, 300])
    moved = [Volume(v.array, v.spacing, np.add(v.origin, shift), v.direction, v.kind, names=v.names) for v in (ct, labels)]
    there = register_patient(*moved, views, bones=('pelvis',), key=patient.id, **QUICK)['pelvis'].pose
    points = bones_of(ct, labels, ('pelvis',))['pelvis'].points
    assert np.abs(apply(there, points + shift) - apply(found['pelvis'].pose, points)).max() < .05


def test_grey_scale_does_not_matter(scene):
    "The same film in 12 bits and as numbers from 0 to 1."
    film = scene[4][0][0]
    np.testing.assert_allclose(unsaturated(film), unsaturated(film/4095), atol=1e-4)


def test_a_film_of_nothing_is_a_failure(scene):
    patient, ct, labels, _, views = scene
    noise = np.random.default_rng(0).integers(0, 4096, views[0][0].shape).astype(np.uint16)
    assert register_patient(ct, labels, [(noise, views[0][1])], bones=('pelvis',), key='noise', **QUICK)['pelvis'].failed


def test_the_pelvis_comes_first_even_where_only_a_femur_is_asked(scene, found):
    patient, ct, labels, _, views = scene
    alone = register_patient(ct, labels, views, bones=('femur_left',), key=patient.id, **QUICK)
    assert list(alone) == ['femur_left']
    np.testing.assert_array_equal(alone['femur_left'].pose, found['femur_left'].pose)


def test_a_femur_begins_in_its_socket(scene, found):
    _, ct, labels, _, views = scene
    ready = bones_of(ct, labels)
    starts = initial_poses(ready['femur_right'], views, found['pelvis'].pose, [(ready['pelvis'], found['pelvis'].pose)])
    heads = np.stack([apply(s, ready['femur_right'].centre) for s in starts])
    assert np.ptp(heads, axis=0).max() < 1e-9
    np.testing.assert_allclose(heads[0], apply(found['pelvis'].pose, hip_centres(labels)['right']), atol=1e-9)


@pytest.mark.parametrize('geometry', [ConeBeam(size=(80, 80), pixel=2.), SlotScan(size=(80, 80), pixel=2.)])
def test_error_in_the_picture_is_blind_to_the_depth_of_a_point_on_the_axis(geometry):
    e = mtre(rigid(ty=30), np.eye(4), np.zeros((1, 3)), geometry)
    assert e.projected == pytest.approx(0, abs=1e-9) and e.distance == pytest.approx(30) and e.depth == pytest.approx(30)


def test_bad_input_is_named(scene):
    _, ct, labels, _, views = scene
    pelvis = bones_of(ct, labels, ('pelvis',))['pelvis']
    for call, word in [(lambda: register_patient(ct, labels, [(views[0][0][:10], views[0][1])]), 'size of its geometry'),
                       (lambda: register_patient(ct, labels, [(views[0][0]*0, views[0][1])]), 'no contrast'),
                       (lambda: register(pelvis, [], np.eye(4), 'pelvis'), 'frontal film'),
                       (lambda: register(pelvis, views, np.ones((4, 4)), 'pelvis'), 'rigid'),
                       (lambda: Bone(ct.like(np.zeros(ct.shape, np.float32), kind='attenuation')), 'bone_volume'),
                       (lambda: bones_of(ct, labels.like(labels.array*0)), 'pelvis')]:
        with pytest.raises(InputError, match=word): call()
