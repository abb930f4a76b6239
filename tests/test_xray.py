"""What crosses modules: tables against the scripts that made them, CT against calibration, radiograph against file."""
import importlib.util
import sys

import numpy as np
import pytest

from bmd_xray.calibration import fit_calibration
from bmd_xray.core import data_path, rng_for
from bmd_xray.ct import sample_scanner, stack_to_hu
from bmd_xray.physics import DENSITY, KEV, beam, load_table, load_world, mu_at
from bmd_xray.radiograph import Radiograph, read_radiograph, write_radiograph
from bmd_xray.xray import render_radiograph, sample_imaging


def script(name):
    sys.path.insert(0, str(data_path('reference')))
    try:
        spec = importlib.util.spec_from_file_location(name, data_path('reference', f'{name}.py'))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally: sys.path.pop(0)


def test_attenuation_is_what_its_script_makes():
    pytest.importorskip('xraydb', reason='needs the physics extra')
    make = script('make_attenuation')
    np.testing.assert_array_equal(make.KEV, KEV)
    for material, stored in load_table('attenuation')[1].items(): np.testing.assert_allclose(make.binned(material), stored, rtol=1e-4)


def test_spectra_are_what_their_script_makes():
    pytest.importorskip('spekpy', reason='needs the physics extra')
    make = script('make_spectra')
    for filtration, kvp in (('al', 75), ('alcu', 105), ('ct', 120)):
        share, tube = make.spectrum(filtration, kvp)
        np.testing.assert_allclose(beam(filtration, kvp), share*tube['photons_mm2_mas'], rtol=1e-4, atol=1e-4*share.max()*tube['photons_mm2_mas'])


def test_tables_stay_small():
    sizes = {n: data_path('reference', f'{n}.csv').stat().st_size for n in ('attenuation', 'spectra', 'tubes')}
    assert sum(sizes.values()) < 200e3, sizes


@pytest.mark.parametrize('institution', [1, 2])
def test_phantom_scan_finds_the_scanner_s_own_line(institution):
    "Noisy inserts of HA in water, 15 x 15 x 20 mm each, through fit_calibration."
    scanner, known, mu = sample_scanner(institution, 'phantom', 1), (0, 50, 100, 150, 200), mu_at(68.)
    hu = []
    for mg in known:
        insert = mg/1000, (1 - mg/1000/DENSITY['ha'])*mu['water']/mu['lean'], 0, 0
        v = stack_to_hu(np.full((24, 22, 22, 4), insert), scanner, rng_for(f'insert {mg}', institution), (1, 1, 1))
        hu.append(v[2:-2, 4:-4, 4:-4].mean())
    line, truth = fit_calibration(hu, known), scanner.true_calibration()
    assert line.r > .9999
    np.testing.assert_allclose(line.slope, truth.slope, rtol=.01)
    np.testing.assert_allclose(line.intercept, truth.intercept, atol=1)


def body(rows=128, cols=96):
    "g/cm2 of an elliptic thigh with a bone whose density is a ramp."
    x = (np.arange(cols) - cols/2 + .5)/(cols/2)
    soft = np.broadcast_to(18*np.sqrt(1 - x**2), (rows, cols))
    ha = np.where(np.abs(x) < .2, np.linspace(.2, 1.5, rows)[:, None], 0)
    return np.stack([ha, soft*.9 - ha*DENSITY['lean']/DENSITY['ha'], soft*.1 + 2, 0*soft]).astype(np.float32)


def test_bone_is_white_on_film_and_in_the_file(tmp_path):
    for modality, institution in (('plain', 1), ('plain', 2), ('eos', 2)):
        im = sample_imaging(modality, institution, 'P1')
        film = render_radiograph(body(), im, rng_for('P1', modality), 2.)
        column, beside = film[:, 40:56].mean(1), film[:, 22:30].mean(1)
        assert np.corrcoef(column - beside, np.linspace(.2, 1.5, 128))[0, 1] > .97, modality
        saved = read_radiograph(write_radiograph(Radiograph(film, 2., magnification=1.1, provenance=dict(KVP=im.kvp)), tmp_path/'f.dcm'))
        np.testing.assert_array_equal(saved.pixels, film)
        assert film.dtype == np.uint16 and film.max() <= 4095
        assert saved.provenance['KVP'] == pytest.approx(im.kvp, rel=1e-6)


def test_difficulty_widens_the_world():
    "The spread of mean brightness over patients with one body grows with difficulty, and is the world's at None."
    world = load_world()
    def spread(d): return np.std([render_radiograph(body(64, 48), sample_imaging('plain', 1, f'P{i}', d), rng_for(f'P{i}'), 4.).mean() for i in range(24)])
    assert spread(0) < .2*spread(1) and spread(1) < .8*spread(2)
    assert sample_imaging('plain', 1, 'P3') == sample_imaging('plain', 1, 'P3', world['difficulty'], world)
