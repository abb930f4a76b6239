"""Object-wise projections of whole patients: before and after an operation, by a cone and a slot, from a map that lacks muscles, from files."""
import numpy as np
import pytest

from bmd_xray.cohort import CTScan, sample_cohort
from bmd_xray.folder import read_cohort
from bmd_xray.objects import ALIGNED, BONES, OBJECTS, aligned_drrs, flip_objects, measure_objects, object_drrs, object_labels, unaligned_drrs
from bmd_xray.study import write_study

SIZE = 64, 32


@pytest.fixture(scope="module")
def patient(): return sample_cohort(1)[0]


@pytest.fixture(scope="module")
def ct(patient): return patient.ct("pre", 4., whole=True)


@pytest.mark.parametrize("institution", [1, 2])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_sums_are_volumes_and_lean_masses(institution, when):
    patient = sample_cohort(2, institution)[1]
    ct, exposure = patient.ct(when, 4., whole=True), next(e for e in patient.exposures() if e.when == when)
    arrays, record = object_drrs(ct, exposure, {b: patient.bone_motion(exposure, b) for b in ALIGNED}, SIZE)
    assert list(arrays) == list(record) and set(arrays) == set(OBJECTS)
    for name, r in record.items():
        area = r["pixel_area_mm2"]/100
        # a cone or a slot scan enlarges what is aligned, and the picture's edge cuts it, by the gain
        assert arrays[name][1].sum(dtype=float)*area/r["gain"] == pytest.approx(r["volume_cm3"], rel=.01), name
        if not r["aligned"]: assert r["gain"] == pytest.approx(1, abs=1e-9) and r["inside"] == 1 and not r["cut"], name
        if not r["aligned"]: assert arrays[name][2].sum(dtype=float)*area == pytest.approx(r["lean_mass_g"], rel=.01), name
        assert (arrays[name][3].any()) == (name in BONES) == (r["bmc_g"] is not None), name
    enlarged = record["pelvis"]["gain"]/record["pelvis"]["inside"]
    nominal = exposure.sdd/exposure.sod
    assert enlarged == pytest.approx(nominal**2 if institution == 1 else nominal, rel=.06)


def test_a_pose_moves_aligned_bones_and_nothing_else(patient, ct):
    first, second = patient.exposures()[:2]
    poses = {e.position: {b: patient.bone_motion(e, b) for b in ALIGNED} for e in (first, second)}
    a, b = (object_drrs(ct, e, poses[e.position], SIZE, kinds=("volume",))[0] for e in (first, second))
    for name in OBJECTS: assert np.array_equal(a[name], b[name]) == (name not in ALIGNED), name
    alone = aligned_drrs(ct, first, {"pelvis": poses[first.position]["pelvis"]}, SIZE, kinds=("volume",))
    assert list(alone) == ["pelvis"] and np.array_equal(alone["pelvis"], a["pelvis"])


def test_what_the_label_map_lacks_is_absent(ct):
    names = {k: v for k, v in ct.labels.names.items() if not k.startswith(("iliacus", "pectineus", "obturator"))}
    few = CTScan(ct.hu, ct.labels.like(ct.labels.array, names=names), None, {})
    arrays, _ = unaligned_drrs(few, SIZE, kinds=("volume",))
    assert set(OBJECTS) - set(arrays) == {f"{m}_{s}" for m in ("iliacus", "pectineus", "obturator_externus") for s in ("left", "right")}
    assert all(r["bmc_g"] is None for r in measure_objects(few, object_labels(few.labels)).values())


def test_left_stays_left(ct):
    arrays, _ = unaligned_drrs(ct, SIZE, kinds=("volume",))
    where = lambda a: (a[0].sum(0) @ np.arange(64))/a[0].sum()
    for name, flipped in flip_objects(arrays).items():
        if name.endswith("left"): assert where(arrays[name]) > 32 and where(flipped) > 32, name  # a frontal film shows the left on the right
        if name.endswith("right"): assert where(arrays[name]) < 32 and where(flipped) < 32, name


def test_files_give_the_same_objects(tmp_path):
    sampled = sample_cohort(1, institution=2)
    write_study(sampled, tmp_path/"study", pixel_mm=4., spacing_mm=4., body_mm=6.)
    read = read_cohort(tmp_path/"study")[0]
    a, b = (unaligned_drrs(p.ct("pre", spacing_mm=4., whole=True), SIZE, kinds=("volume", "lean_mass"))[0] for p in (sampled[0], read))
    assert set(a) == set(b)
    for name in a: assert np.allclose(a[name], b[name], atol=.02*a[name].max()), name  # HU are rounded in the file
