"""`bmdx predict --model muscles` from end to end with the shipped model: what it reads, what it refuses, and by which name."""
import shutil

import numpy as np
import pandas as pd
import pytest

from bmd_xray.anatomy import MUSCLES
from bmd_xray.chest_cohort import ChestPatient
from bmd_xray.cohort import FIELD_MM, Patient
from bmd_xray.core import InputError, data_path
from bmd_xray.predict_run import predict_images
from bmd_xray.radiograph import Radiograph, write_radiograph

SHIPPED = data_path('weights', 'muscles')
needs_model = pytest.mark.skipif(not (SHIPPED/'predictor.json').exists(), reason='no model there yet: bmdx train-predictor --kind muscles makes it')


def shoot(patient, when='pre'):
    "A film of both hips and its magnification."
    exposure = next(e for e in patient.exposures() if e.when == when)
    return patient.film(exposure, (128, 64), 3.).astype(np.float32), exposure.sdd/exposure.sod


def write(path, film, magnification, **header):
    return write_radiograph(Radiograph(film, FIELD_MM/128*magnification, (0., 4095.), magnification, **{'view': 'AP', **header}), path)


@pytest.fixture(scope='module')
def patient(): return Patient('muscle-test-film', 1)


@needs_model
def test_muscles_of_both_sides_with_a_page_and_dicom(patient, tmp_path):
    film, magnification = shoot(patient)
    table, failed = predict_images([write(tmp_path/'a.dcm', film, magnification)], tmp_path/'out', 'muscles', dicom=True)
    assert not len(failed) and sorted(table.side) == ['left', 'right'] and 'abmd' not in table
    labels = patient.ct('pre', whole=True).labels
    off = []
    for row in table.itertuples():
        for m in MUSCLES:
            value = getattr(row, f'{m}_volume')
            true = (labels.array == labels.names[f'{m}_{row.side}']).sum()*labels.voxel_volume_mm3/1000
            if not np.isnan(value): off.append(value/true - 1); assert getattr(row, f'{m}_volume_low') < value < getattr(row, f'{m}_volume_high')
    assert len(off) >= 8 and np.abs(off).mean() < .3, off
    folder = tmp_path/'out'/table.film[0]
    assert (folder/'page.png').stat().st_size > 20_000 and list((folder/'dicom').glob('*iliacus_volume.dcm'))
    mirrored, _ = predict_images([write(tmp_path/'b.dcm', film[:, ::-1].copy(), magnification)], tmp_path/'mirrored', 'muscles')
    a, b = (t.set_index('side').gluteus_maximus_volume for t in (table, mirrored))
    assert abs(a['left']/b['right'] - 1) < .15 and abs(a['right']/b['left'] - 1) < .15, 'sides were not exchanged'


@needs_model
def test_a_side_with_an_implant_and_what_is_no_pelvis_give_nothing(patient, tmp_path):
    after, magnification = shoot(patient, 'post')
    film, _ = shoot(patient)
    chest = ChestPatient('test-chest-film')
    files = [write(tmp_path/'after.dcm', after, magnification), write(tmp_path/'half.dcm', film[:, :64].copy(), magnification),
             write(tmp_path/'chest.dcm', chest.film(chest.films[0], (192, 192), 3.), 1.1), write(tmp_path/'upside.dcm', film[::-1].copy(), magnification)]
    table, failed = predict_images(files, tmp_path/'out', 'muscles')
    assert len(failed) == 3 and failed.reason.str.contains('hip').all(), failed.reason.tolist()
    there = table.set_index('side').loc[patient.operative_side]
    assert there.refused == 'implant' and pd.isna(there.iliacus_volume) and table[table.side != patient.operative_side].gluteus_maximus_volume.notna().all()
    _, failed = predict_images([write(tmp_path/'again.dcm', film, magnification)], tmp_path/'t', 'muscles', 'nhanes3')
    assert 'no bone density' in failed.reason[0]


@needs_model
@pytest.mark.parametrize('file', ['decomposer/model.safetensors', 'locator/model.safetensors', 'readings.safetensors'])
def test_harmed_files_are_named(file, patient, tmp_path):
    shutil.copytree(SHIPPED, tmp_path/'muscles')
    raw = bytearray((tmp_path/'muscles'/file).read_bytes()); raw[-7] ^= 1
    (tmp_path/'muscles'/file).write_bytes(raw)
    with pytest.raises(InputError, match='than were written'): predict_images([write(tmp_path/'a.dcm', *shoot(patient))], tmp_path/'out', tmp_path/'muscles')
