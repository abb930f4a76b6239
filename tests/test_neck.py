"""`bmdx predict --model neck` from end to end with the shipped model: films as systems write them, films of something else, implants, harmed files."""
import shutil

import numpy as np
import pytest
from PIL import Image

from bmd_xray.chest_cohort import ChestPatient
from bmd_xray.cohort import Patient
from bmd_xray.core import InputError, data_path
from bmd_xray.hip_study import PRETRAINED, TUNED
from bmd_xray.neck_training import NeckPredictorConfig
from bmd_xray.predict_run import predict_images
from bmd_xray.radiograph import Radiograph, write_radiograph

SHIPPED = data_path('weights', 'neck')
needs_model = pytest.mark.skipif(not (SHIPPED/'predictor.json').exists(), reason='no model there yet: bmdx train-predictor --kind neck makes it')
PIXEL = 320/192 # mm in the patient


def shoot(patient, exposure): return patient.film(exposure, (192, 96), spacing_mm=3.), exposure.sdd/exposure.sod


def write(path, film, magnification, **header):
    return write_radiograph(Radiograph(film.astype(np.float32), PIXEL*magnification, (0., 4095.), magnification, **dict(view='AP') | header), path)


@pytest.fixture(scope='module')
def patient(): return Patient('predict-neck-test', 1)


@pytest.fixture(scope='module')
def shot(patient): return shoot(patient, next(e for e in patient.exposures() if e.position == 'supine'))


@needs_model
def test_a_film_however_it_is_written(shot, tmp_path):
    "DICOM and picture say the same, twice the same bytes; what is given is in order, and a page is made."
    film, magnification = shot
    write(tmp_path/'hip.dcm', film, magnification, body_part='PELVIS')
    Image.fromarray((film*16).astype(np.uint16)).save(tmp_path/'hip.png')
    table, failed = predict_images([tmp_path/'hip.dcm'], tmp_path/'a', 'neck', 'nhanes3', dicom=True)
    again, _ = predict_images([tmp_path/'hip.dcm'], tmp_path/'b', 'neck', 'nhanes3', dicom=True)
    picture, _ = predict_images([tmp_path/'hip.png'], tmp_path/'c', 'neck', 'nhanes3', spacing=PIXEL*magnification, magnification=magnification)
    assert not len(failed) and table.equals(again)
    assert table.site.tolist() == picture.site.tolist() == ['right hip', 'left hip'] and table.abmd.between(.3, 1.5).all()
    for a, b in (('abmd_low', 'abmd'), ('abmd', 'abmd_high'), ('osteoporosis_low', 'osteoporosis'), ('osteoporosis', 'osteoporosis_high')):
        assert (table[a] <= table[b]).all(), (a, b)
    assert np.allclose(table.t_score, (table.abmd - .942)/.122, atol=1e-4) # Looker 1998, total hip
    assert np.allclose(table.abmd, picture.abmd, atol=.01)
    assert {'page.png', 'page.html', 'prediction.json', 'dicom'} <= {p.name for p in (tmp_path/'a'/table.film[0]).iterdir()}


@needs_model
def test_one_hip_and_the_same_hip_elsewhere_on_a_film(shot, tmp_path):
    film, magnification = shot
    write(tmp_path/'both.dcm', film, magnification)
    write(tmp_path/'left.dcm', film[:, 80:], magnification)
    write(tmp_path/'wide.dcm', np.pad(film, ((40, 10), (5, 60))), magnification)
    table, failed = predict_images([tmp_path/f'{n}.dcm' for n in ('both', 'left', 'wide')], tmp_path/'out', 'neck')
    assert not len(failed) and 't_score' not in table
    left = table[table.site == 'left hip'].abmd.to_numpy()
    assert len(left) == 3 and np.ptp(left) < .04, left


@needs_model
def test_what_is_no_hip_is_refused(shot, tmp_path):
    "By what the header says, and by what the picture shows where the header lies."
    film, magnification = shot
    chest = ChestPatient('test-chest-film')
    other = chest.film(chest.films[0], (192, 192), 3.)
    files = [write(tmp_path/'lies.dcm', other, 1.1, body_part='PELVIS'), write(tmp_path/'chest.dcm', other, 1.1, body_part='CHEST'),
             write(tmp_path/'lateral.dcm', film, magnification, view='LL'), write(tmp_path/'upside.dcm', film[::-1].copy(), magnification),
             write(tmp_path/'turned.dcm', film.T.copy(), magnification)]
    table, failed = predict_images(files, tmp_path/'out', 'neck')
    assert not len(table) and len(failed) == 5
    for reason, words in zip(failed.reason, ('no hip found', 'CHEST', 'frontal', 'no hip found', 'no hip found')): assert words in reason, reason


@needs_model
def test_an_implant_is_refused_and_the_other_hip_read(patient, tmp_path):
    film, magnification = shoot(patient, next(e for e in patient.exposures() if e.when == 'post'))
    table, _ = predict_images([write(tmp_path/'after.dcm', film, magnification)], tmp_path/'out', 'neck', 'nhanes3')
    there = table.set_index('side').loc[patient.operative_side]
    assert np.isnan(there.abmd) and np.isnan(there.osteoporosis) and there.refused == 'implant'
    assert table[table.side != patient.operative_side].abmd.notna().all()


@needs_model
@pytest.mark.parametrize('file', ['network/model.safetensors', 'localiser/model.safetensors', 'locator/model.safetensors', 'readings.safetensors'])
def test_harmed_files_are_named(file, shot, tmp_path):
    shutil.copytree(SHIPPED, tmp_path/'neck')
    raw = bytearray((tmp_path/'neck'/file).read_bytes()); raw[-7] ^= 1
    (tmp_path/'neck'/file).write_bytes(raw)
    with pytest.raises(InputError, match='than were written'): predict_images([write(tmp_path/'a.dcm', *shot)], tmp_path/'out', tmp_path/'neck')


@needs_model
def test_the_folder_is_small_and_says_how_it_was_made():
    from bmd_xray.predict import load_predictor
    assert sum(f.stat().st_size for f in SHIPPED.rglob('*') if f.is_file()) < 2e6
    about = load_predictor(SHIPPED).about
    assert about['method'] in [*PRETRAINED, *TUNED] and about['method'] in about['validation_r']


def test_the_command_and_its_methods(capsys):
    from bmd_xray.cli import main
    assert main(['train-predictor', '--kind', 'neck', '--help']) == 0
    assert '--method' in (said := capsys.readouterr().out) and 'Mean teacher' in said
    assert main(['train-predictor', '--kind', 'neck', '--method', 'SSL + triplets']) == 2
    pool = {m: NeckPredictorConfig(method=m).study().unlabelled for m in ('Baseline', 'Fine-tuned', 'SSL')}
    assert pool['Baseline'] == pool['Fine-tuned'] == 0 < pool['SSL'], 'nobody waits for films that no method sees'
    assert NeckPredictorConfig(method='Proposed').arms == ['Baseline + ATL', 'Proposed']
    with pytest.raises(InputError, match='both hips'): NeckPredictorConfig(test=121)
