"""From a hospital's files to pairs, with nothing known but CT and X-rays."""
import json

import numpy as np
import pytest

from bmd_xray.cli import main
from bmd_xray.cohort import sample_cohort
from bmd_xray.core import data_path
from bmd_xray.folder import read_cohort
from bmd_xray.geometry import apply
from bmd_xray.measured import Measured, read_kept
from bmd_xray.results import read_pairs
from bmd_xray.study import centred, write_study


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    "A patient's study as it leaves the scanners: CT, frontal and lateral EOS, the curve of the CT scanner; before the operation only."
    import pandas as pd
    folder, cohort = tmp_path_factory.mktemp("study")/"raw", sample_cohort(1, institution=2)
    table = pd.read_csv(write_study(cohort, folder, pixel_mm=1.25, spacing_mm=2., body_mm=2.5, raw=True))
    table[table.when == "pre"].to_csv(folder/"manifest.csv", index=False)
    return folder, cohort[0]


def test_pairs_from_ct_and_xrays_alone(raw, tmp_path):
    folder, patient = raw
    assert main(["pairs", str(folder), "--out", str(tmp_path/"pairs"), "--size", "128", "64", "--occasions", "pre", "--workers", "1"]) == 0
    pairs = read_pairs(tmp_path/"pairs")
    assert sorted(pairs.table.side) == ["left", "right"]
    record = json.loads(next((tmp_path/"pairs").glob("*/record.json")).read_text())
    assert record["chain"]["scans"]["pre"]["calibration"]["method"] == "given" and record["chain"]["scans"]["pre"]["segmentation"]["source"] == "network"
    assert next((tmp_path/"pairs").glob("*/qc.html")).stat().st_size > 50_000
    exposure, size = centred(patient.exposures()[0]), (128, 64)
    ct = patient.ct("pre", 2., whole=True)
    from bmd_xray.pairs import pf_drr, proximal_femur_density, split_hips
    for i, side in enumerate(pairs.table.side):
        assert pairs.table.abmd[i] == pytest.approx(ct.bmd(side).abmd, rel=.12)  # beam hardening and the segmented edge are in it
        true = split_hips(pf_drr(proximal_femur_density(ct, side), exposure, patient.bone_motion(exposure, f"femur_{side}"), size))[side]
        mine = pairs.drr[i, 0]
        overlap = 2*((mine > .1) & (true > .1)).sum()/((mine > .1).sum() + (true > .1).sum())
        assert overlap > .9 and np.corrcoef(mine.ravel(), true.ravel())[0, 1] > .97


def test_what_the_manifest_states_is_not_measured(raw):
    folder, patient = raw
    seen = read_cohort(folder)[0]
    assert seen.stated_motions == set() and Measured(seen).examine("pre").scan.calibration.source.startswith("mean line")


def test_a_ct_without_labels_is_segmented(raw, tmp_path):
    folder, patient = raw
    ct = next((folder/"ct").glob("*_pre.nii.gz"))
    assert main(["measure", str(ct), "--out", str(tmp_path/"out"), "--calibration", str(folder/"calibration.json")]) == 0
    report = json.loads((tmp_path/"out/measure.json").read_text())
    assert min(report["expected_dice"][f"femur_{s}"] for s in ("left", "right")) > .9
    muscles = {(r["structure"], r["side"]): r for r in report["structures"] if r["tissue"] == "muscle"}
    true = patient.raw_ct("pre", 2.)[1]
    for side in ("left", "right"):
        cm3 = true.mask(f"gluteus_maximus_{side}").sum()*true.voxel_volume_mm3/1000
        assert muscles["gluteus_maximus", side]["volume_cm3"] == pytest.approx(cm3, rel=.05)
    assert [b["refused"] for b in report["bmd"]] == [[], []]


def test_what_was_kept_is_read_and_not_measured():
    kept = read_kept(data_path("measured", "eos_demo"))
    assert {"I1-0001", "I2-0001"} <= set(kept.table.patient)
    patient = sample_cohort(1, institution=2)[0]
    exposure, measured = patient.exposures()[0], Measured(patient, kept=kept)
    scan = measured.ct("pre")
    for side in ("left", "right"):
        centre = scan.landmarks[side].head_centre
        assert np.linalg.norm(centre - patient.femur_landmarks(patient.ct_angles("pre"), side).head_centre) < 3
        assert scan.labels.mask(f"femur_{side}")[tuple(np.rint(scan.hu.to_index(centre)).astype(int)[::-1])]
        there = [apply(m, centre) for m in (measured.bone_motion(exposure, f"femur_{side}"), patient.bone_motion(exposure, f"femur_{side}"))]
        assert np.linalg.norm(there[0] - there[1]) < 5
    after = patient.exposures()[1]
    assert not measured.usable(after, f"femur_{patient.operative_side}")
