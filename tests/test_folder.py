"""A sampled cohort written as a hospital's study and read back: the two roads to training pairs must meet."""
import numpy as np
import pytest

from bmd_xray.cohort import sample_cohort
from bmd_xray.core import InputError
from bmd_xray.folder import read_cohort
from bmd_xray.pairs import load_pairs
from bmd_xray.study import write_study

SIZE = 64, 32


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    import os
    folder = tmp_path_factory.mktemp("study")
    before = os.environ.get("BMDX_CACHE")
    os.environ["BMDX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    cohort = sample_cohort(1, institution=2)
    write_study(cohort, folder/"out", pixel_mm=2., spacing_mm=4., body_mm=4.)
    yield cohort, folder/"out"
    os.environ.pop("BMDX_CACHE") if before is None else os.environ.update(BMDX_CACHE=before)


def test_pairs_from_files_equal_pairs_from_the_generator(study):
    cohort, folder = study
    real, sampled = load_pairs(read_cohort(folder), SIZE, workers=1), load_pairs(cohort, SIZE, 4., workers=1)
    key = ["side", "when", "position"]
    assert real.table[key].values.tolist() == sampled.table[key].values.tolist()
    # the study's pictures are centred on the hips, the generator's a little below them: what is projected must agree, not where
    for k in ("abmd", "vbmd"): assert np.allclose(real.table[k].astype(float), sampled.table[k], rtol=.01), k
    before = (sampled.table.when == "pre").to_numpy()  # DXA is an examination before the operation
    assert np.allclose(real.table.dxa[before].astype(float), sampled.table.dxa[before], rtol=.02)
    mass = lambda p: (p.drr.sum((1, 2, 3), dtype=float)*p.table.pixel_area_mm2).to_numpy()
    assert np.allclose(mass(real), mass(sampled), rtol=.02)
    assert real.xray.max() <= 4095 and real.xray.std() > 100


def test_without_a_motion_the_remedy_is_registration(study):
    import pandas as pd
    _, folder = study
    table = pd.read_csv(folder/"manifest.csv")
    table.assign(motion=None).to_csv(folder/"manifest.csv", index=False)
    with pytest.raises(InputError, match="register"): load_pairs(read_cohort(folder), SIZE, workers=1)
    table.to_csv(folder/"manifest.csv", index=False)
