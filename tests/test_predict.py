"""`bmdx predict` from end to end with the shipped model: films as systems write them, bad ones, stopped batches, DICOM results, and nobody's name anywhere."""
import argparse
import gzip
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from bmd_xray.chest_cohort import ChestPatient
from bmd_xray.cohort import Patient
from bmd_xray.core import InputError, data_path
from bmd_xray.predict import KINDS, Measure, Prediction, Site, load_predictor, register
from bmd_xray.predict_run import add_arguments, open_film, predict_images, run_from_args
from bmd_xray.radiograph import Radiograph, write_radiograph
from bmd_xray.volume import InputWarning

PIXEL = 2.5 # mm in the patient
SHIPPED = data_path('weights', 'hip')
needs_model = pytest.mark.skipif(not (SHIPPED/'predictor.json').exists(), reason='no model there yet: bmdx train-predictor makes it')
NAMES = dict(PatientName='Yamada^Hanako', PatientID='ID-4711-0815', PatientBirthDate='19470227', AccessionNumber='ACC77231', InstitutionName='Kiyose Hospital',
             ReferringPhysicianName='Sato^Ken', StudyDate='20240511', StudyID='ST991', OtherPatientIDs='OTHER-55', StationName='ROOM7XR')


def predict(*arguments):
    "The command, in this process."
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run_from_args(parser.parse_args([str(a) for a in arguments]))


@pytest.fixture(scope='module')
def shot():
    "A film of both hips, 12 bits, and its magnification."
    patient = Patient('predict-test-film', 1)
    exposure = patient.exposures()[0]
    return patient.film(exposure, (128, 64), spacing_mm=3.).astype(np.float32), exposure.sdd/exposure.sod


@pytest.fixture(scope='module')
def model(): return load_predictor(SHIPPED)


@pytest.fixture
def dicom(shot, tmp_path):
    "A function that writes the film as a DICOM with some header fields, and pixels, of its own."
    film, magnification = shot
    base = write_radiograph(Radiograph(film, PIXEL*magnification, (0., 4095.), magnification, view='AP'), tmp_path/'.base.dcm')
    def write(name='film.dcm', a=film, drop=(), **header):
        ds = dcmread(base)
        bits = header.get('BitsAllocated', 16)
        ds.Rows, ds.Columns = np.shape(a)[:2]
        ds.PixelData = np.ascontiguousarray(a).astype(np.uint8 if bits == 8 else np.uint16).tobytes()
        for k, v in header.items(): setattr(ds, k, v)
        for k in drop: delattr(ds, k)
        ds.save_as(tmp_path/name)
        return tmp_path/name
    return write


def hips(model, path, **kw):
    "Measures of a film's hips."
    found = model.predict(open_film(path, model, **kw)[0])
    return {s.side: {m.name: m.value for m in s.measures} for s in found.sites}


def same(a, b, tolerance=.02):
    assert set(a) == set(b)
    for side in a:
        for m, v in a[side].items():
            assert (v is None) == (b[side][m] is None), (side, m)
            if v is not None: assert abs(b[side][m]/v - 1) < tolerance, (side, m, v, b[side][m])


@needs_model
def test_variants_of_one_film(model, dicom, shot, tmp_path):
    "However a system writes it, the film says the same."
    film, magnification = shot
    plain = hips(model, dicom())
    assert set(plain) == {'left', 'right'} and all(v['abmd'] is not None for v in plain.values())
    same(plain, hips(model, dicom(a=4095 - film, PhotometricInterpretation='MONOCHROME1')), 1e-4)
    same(plain, hips(model, dicom(a=film//16, BitsAllocated=8, BitsStored=8, HighBit=7, WindowCenter=128, WindowWidth=256)), .05)
    same(plain, hips(model, dicom(BitsStored=16, HighBit=15)), 1e-4)                             # the window says what the range does not
    table = Dataset()
    table.add_new(0x00283002, 'US', [4096, 0, 12]); table.add_new(0x00283006, 'US', list(range(4096)))
    same(plain, hips(model, dicom(a=film, VOILUTSequence=[table], drop=['WindowCenter', 'WindowWidth'])), 1e-4)
    same(plain, hips(model, dicom(PixelSpacing=[PIXEL, PIXEL])), 1e-3)                            # calibrated in the patient
    distances = dict(DistanceSourceToDetector=1000*magnification, DistanceSourceToPatient=1000)
    same(plain, hips(model, dicom(drop=['EstimatedRadiographicMagnificationFactor'], **distances)), 1e-3)
    same(plain, hips(model, dicom(a=film[:, ::-1], PatientOrientation=['R', 'F'])), 1e-4)         # seen from behind
    same(plain, hips(model, dicom(SOPClassUID='1.2.840.10008.5.1.4.1.1.7', Modality='OT')), 1e-4) # a secondary capture
    Image.fromarray((film*16).astype(np.uint16)).save(tmp_path/'a.tif')
    same(plain, hips(model, tmp_path/'a.tif', spacing=PIXEL*magnification, magnification=magnification), .02)


@needs_model
def test_an_unknown_magnification_is_said(model, dicom, shot):
    film, _ = open_film(dicom(drop=['EstimatedRadiographicMagnificationFactor']), model)
    assert any('magnification not stated' in n for n in film.notes)
    assert film.pixel_mm == pytest.approx(PIXEL*shot[1]/model.magnification)


@needs_model
def test_laterality(model, dicom, shot):
    "A mirrored film exchanges the hips; on a film of one hip the header's side is believed, and the contradiction said."
    film, _ = shot
    plain, mirrored = hips(model, dicom()), hips(model, dicom(a=film[:, ::-1]))
    volume = lambda found, side: found[side]['gluteus_maximus_volume']
    for side, other in (('left', 'right'), ('right', 'left')): assert abs(volume(mirrored, other)/volume(plain, side) - 1) < .05
    same(plain, hips(model, dicom(a=film[:, ::-1]), flipped=True), 1e-4)
    half = film[:, 60:]
    assert list(hips(model, dicom(a=half))) == ['left'] == list(hips(model, dicom(a=half, ImageLaterality='L')))
    found = model.predict(open_film(dicom(a=half, ImageLaterality='R'), model)[0])
    assert [s.side for s in found.sites] == ['right'] and 'mirrored film' in [f.name for f in found.sites[0].flags]


BAD = dict( # what is broken: how to make it, words of the error
    rgb_dicom=(lambda d, f, s: d(SamplesPerPixel=3, PhotometricInterpretation='RGB'), 'grey'),
    chest=(lambda d, f, s: d(BodyPartExamined='CHEST'), 'CHEST'),
    lateral=(lambda d, f, s: d(ViewPosition='LL'), 'frontal'),
    no_spacing=(lambda d, f, s: d(drop=['ImagerPixelSpacing']), '--spacing'),
    empty_picture=(lambda d, f, s: d(a=s*0 + 7), 'constant'),
    no_hip=(lambda d, f, s: d(a=np.tile(np.linspace(0, 4095, 128), (128, 1))), 'no hip found'),
    upside_down=(lambda d, f, s: d(a=s[::-1]), 'no hip found'),
    ct=(lambda d, f, s: d(Modality='CT'), 'CT'),
    text=(lambda d, f, s: _text(f/'film.dcm'), 'neither DICOM'),
    empty_file=(lambda d, f, s: _text(f/'film.dcm', ''), '0 bytes'),
    png_without_spacing=(lambda d, f, s: _png(f/'film.png', s), 'spacing'),
    rgb_png=(lambda d, f, s: _png(f/'film.png', np.repeat(s[..., None], 3, 2)), 'spacing|mode RGB'))


def _text(path, words='no film'): path.write_text(words); return path
def _png(path, a): Image.fromarray((a/16).astype(np.uint8)).save(path); return path


@needs_model
@pytest.mark.parametrize('case', BAD)
def test_bad_films_are_named(case, model, dicom, shot, tmp_path):
    make, words = BAD[case]
    path = make(dicom, tmp_path, shot[0])
    with pytest.raises(InputError, match=words): model.predict(open_film(path, model)[0])
    table, failed = predict_images([path], tmp_path/'out')
    assert not len(table) and len(failed) == 1 and path.name not in failed.reason[0]


@needs_model
def test_a_chest_gives_no_number_whatever_its_scale(model, tmp_path):
    "A picture has no header to be refused by, and a wrong --spacing can make a chest as wide as a pelvis."
    for name in ('test-chest-film', 'C-0001'):
        chest = ChestPatient(name)
        picture = _png(tmp_path/f'{name}.png', chest.film(chest.films[0], (192, 192), 4.).astype(float))
        for spacing in (1.2, 1.6, 2., 2.5):
            try: sites = model.predict(open_film(picture, model, spacing=spacing, magnification=1.1)[0]).sites
            except InputError as e: assert 'no hip found' in str(e)
            else: assert all(m.value is None for s in sites for m in s.measures), f'{name} at {spacing} mm: {sites}'


@needs_model
def test_rgb_png_with_spacing(model, shot, tmp_path):
    with pytest.raises(InputError, match='mode RGB'): open_film(_png(tmp_path/'a.png', np.repeat(shot[0][..., None], 3, 2)), model, spacing=1.)


@needs_model
def test_bad_models(tmp_path, dicom):
    film = dicom()
    with pytest.raises(InputError, match='pickle'): predict_images([film], tmp_path/'o', model=tmp_path/'a.pth')
    with pytest.raises(InputError, match=r'predictor.json'): predict_images([film], tmp_path/'o', model=tmp_path)
    (tmp_path/'predictor.json').write_text('{"kind": "heart"}')
    with pytest.raises(InputError, match='heart'): predict_images([film], tmp_path/'o', model=tmp_path)
    broken = tmp_path/'hip'
    shutil.copytree(SHIPPED, broken)
    raw = bytearray((broken/'decomposition'/'model.safetensors').read_bytes()); raw[-7] ^= 1
    (broken/'decomposition'/'model.safetensors').write_bytes(raw)
    with pytest.raises(InputError, match='than were written'): predict_images([film], tmp_path/'o', model=broken)
    shutil.rmtree(broken); shutil.copytree(SHIPPED, broken)
    about = json.loads((broken/'predictor.json').read_text())
    about['lines']['abmd'] = [1., .5]                                                    # a model of another line is another model
    (broken/'predictor.json').write_text(json.dumps(about))
    with pytest.raises(InputError, match='than were written'): predict_images([film], tmp_path/'o', model=broken)


@needs_model
def test_batch_resumes_and_its_exit_code_tells(dicom, shot, tmp_path, capsys):
    good, bad = dicom('a.dcm'), _text(tmp_path/'b.dcm')
    out = tmp_path/'out'
    assert predict(good, bad, '--out', out) == 1
    said = capsys.readouterr()
    assert '1 failed' in said.out and 'neither DICOM' in said.err and 'Research use only' in said.out
    made = {f: f.stat().st_mtime_ns for f in out.glob('film-*/*')}
    assert len(pd.read_csv(out/'failures.csv')) == 1
    assert predict(good, dicom('c.dcm', a=np.roll(shot[0], 1, 0)), '--out', out) == 0
    assert all(f.stat().st_mtime_ns == t for f, t in made.items())                       # nothing was done again
    table = pd.read_csv(out/'predictions.csv')
    assert table.film.nunique() == 2 and len(table) == 4 and (table.abmd_low <= table.abmd).all() and (table.abmd <= table.abmd_high).all()
    assert len(pd.read_csv(out/'failures.csv')) == 0
    assert predict(bad, '--out', tmp_path/'none') == 2
    (next(out.glob('film-*'))/'prediction.json').write_text('{')                         # a harmed result is made again
    assert predict(good, '--out', out) == 0 and len(pd.read_csv(out/'predictions.csv')) == 2


@needs_model
@pytest.mark.parametrize('border', [1., .8], ids=['white', 'light grey'])
def test_a_border_of_any_brightness_is_beyond_the_film(border, model, dicom, shot):
    a, b = shot[0].copy(), shot[0].copy()
    rows = round(25/PIXEL)
    a[-rows:], b[-rows:] = 0, border*4095
    same(hips(model, dicom('black.dcm', a=a)), hips(model, dicom('border.dcm', a=b)), 1e-3)


@needs_model
def test_results_among_the_films_are_no_films(dicom, tmp_path):
    dicom()
    out = tmp_path/'results'
    assert predict(tmp_path, '--out', out, '--dicom') == 0
    assert predict(tmp_path, '--out', out, '--dicom') == 0 and len(pd.read_csv(out/'failures.csv')) == 0


@needs_model
def test_a_terminal_that_closes_is_no_failure_of_the_film(dicom, tmp_path):
    def closed(*told): raise BrokenPipeError
    with pytest.raises(BrokenPipeError): predict_images([dicom()], tmp_path/'out', progress=closed)
    assert len(predict_images([tmp_path/'film.dcm'], tmp_path/'out')[1]) == 0


@needs_model
def test_names_of_bad_files_stay_out_of_the_table(dicom, tmp_path, monkeypatch):
    for name in ('SMITH_JOHN_19500101', 'Smith John 1950.dcm'): dicom(name, Modality='CT')
    _text(tmp_path/'Mueller.bmp'); _text(tmp_path/'Mueller.jp2')
    monkeypatch.chdir(tmp_path)
    assert predict('.', '--out', 'out') == 2
    told = (tmp_path/'out'/'failures.csv').read_text()
    assert len(pd.read_csv(tmp_path/'out'/'failures.csv')) == 4 and not any(w in told.lower() for w in ('smith', 'john', 'mueller', '1950')), told


def everything(folder):
    "All bytes of all files, unpacked."
    for f in folder.rglob('*'):
        if f.is_file(): yield f, (gzip.decompress(f.read_bytes()) if f.suffix == '.gz' else f.read_bytes())


@needs_model
def test_no_identifier_gets_out(dicom, tmp_path):
    source = dicom('Yamada_Hanako_4711.dcm', **NAMES)
    studies = dcmread(source)
    words = [*NAMES.values(), 'Yamada', 'Hanako', '_4711', studies.StudyInstanceUID, studies.SOPInstanceUID, studies.SeriesInstanceUID]
    assert predict(source, '--out', tmp_path/'out', '--dicom', '--reference', 'nhanes3') == 0
    files = dict(everything(tmp_path/'out'))
    assert len(files) > 30
    for f, data in files.items():
        for w in words: assert w.encode() not in data and w not in str(f.relative_to(tmp_path)), (f.name, w)
    assert predict(source, '--out', tmp_path/'kept', '--dicom', '--keep-identifiers') == 0
    page = dcmread(next((tmp_path/'kept').rglob('page.dcm')))
    assert (str(page.PatientName), page.PatientID, page.StudyInstanceUID) == ('Yamada^Hanako', 'ID-4711-0815', studies.StudyInstanceUID)
    assert page.SOPInstanceUID != studies.SOPInstanceUID and page.PatientIdentityRemoved == 'NO'
    assert page.BurnedInAnnotation == 'YES'                                              # the page shows the file's name
    assert dcmread(next((tmp_path/'out').rglob('page.dcm'))).BurnedInAnnotation == 'NO'
    assert pd.read_csv(tmp_path/'kept'/'predictions.csv').file[0].endswith('Yamada_Hanako_4711.dcm')
    assert predict(dicom('burned.dcm', BurnedInAnnotation='YES'), '--out', tmp_path/'burned', '--dicom') == 0
    assert dcmread(next((tmp_path/'burned').rglob('page.dcm'))).BurnedInAnnotation == 'YES'
    assert 'burned into its picture' in pd.read_csv(tmp_path/'burned'/'predictions.csv').notes[0]


@needs_model
def test_a_birth_date_that_is_none(dicom, tmp_path):
    "It is left out with a warning; the rest of the header is kept and the results are written."
    with pytest.warns(InputWarning, match="PatientBirthDate: '1947' is none"):
        assert predict(dicom(**NAMES | dict(PatientBirthDate='1947')), '--out', tmp_path/'out', '--dicom', '--keep-identifiers') == 0
    for f in (tmp_path/'out').rglob('*.dcm'):
        found = dcmread(f)
        assert (found.get('PatientBirthDate') or '', found.PatientID, found.StudyDate) == ('', 'ID-4711-0815', '20240511'), f.name


@needs_model
def test_dicom_results(dicom, tmp_path):
    "Read again by pydicom and highdicom: identifiers new and unique, one study, values those of the table, maps those of the NIfTI."
    import highdicom as hd

    import SimpleITK as sitk
    assert predict(dicom(), '--out', tmp_path/'out', '--dicom') == 0
    folder = next((tmp_path/'out').glob('film-*'))
    made = {f.name: dcmread(f) for f in (folder/'dicom').iterdir()}
    assert len({d.SOPInstanceUID for d in made.values()}) == len(made) and len({d.StudyInstanceUID for d in made.values()}) == 1
    assert made['page.dcm'].SOPClassUID == '1.2.840.10008.5.1.4.1.1.7' and made['page.dcm'].pixel_array.ndim == 3
    report = hd.sr.srread(folder/'dicom'/'report.dcm')
    table = pd.read_csv(tmp_path/'out'/'predictions.csv').set_index('site')
    for group in report.content.get_image_measurement_groups():
        row = table.loc[group.tracking_identifier]
        values = {m.name.meaning: m for m in group.get_measurements()}
        abmd = values['aBMD, proximal femur']
        assert abmd.value == pytest.approx(row.abmd, rel=1e-4) and abmd.unit.value == 'g/cm2'
        assert values['Gluteus maximus, volume'].value == pytest.approx(row.gluteus_maximus_volume, rel=1e-4)
        assert group.finding_sites[0].laterality.meaning.lower() == row.side
    ds = made['left_hip_bone.dcm']
    nifti = sitk.ReadImage(folder/'maps'/'left_hip_bone.nii.gz') # one voxel thick
    assert np.allclose(ds.pixel_array*float(ds.RescaleSlope), sitk.GetArrayFromImage(nifti)[::-1, 0], atol=1e-4) and nifti.GetSpacing()[0] == pytest.approx(2.5)
    record = json.loads((folder/'prediction.json').read_text())
    assert {s['site'] for s in record['sites']} == set(table.index)


def test_another_kind_registers_and_is_served(dicom, tmp_path):
    "A chest model, say: its own sites and measures go through page, tables and DICOM unchanged."
    @register('toy-spine')
    class Spine:
        "L1 to L4 from the mean grey."
        name = 'toy 1'
        magnification = 1.1
        @classmethod
        def load(cls, folder, about, device): return cls()
        def accept(self, radiograph):
            if radiograph.body_part == 'PELVIS': raise InputError('film', got='PELVIS', expected='a chest')
        def predict(self, film, reference=None):
            value = float(film.grey.mean())
            measure = lambda i: Measure('abmd', 'g/cm2', value, value - .1, value + .1, '', f'aBMD, L{i}')
            return Prediction('toy-spine', self.name, film, tuple(Site(f'L{i}', None, (measure(i),), (), {}, (0, 10, 0, 10)) for i in range(1, 5)), .9)
    try:
        (tmp_path/'m').mkdir(); (tmp_path/'m'/'predictor.json').write_text('{"kind": "toy-spine"}')
        films = dicom('p.dcm', BodyPartExamined='PELVIS'), dicom('c.dcm', BodyPartExamined='CHEST', StudyInstanceUID=generate_uid())
        table, failed = predict_images(films, tmp_path/'out', model=tmp_path/'m', dicom=True)
        assert list(table.site) == ['L1', 'L2', 'L3', 'L4'] and len(failed) == 1
        assert len(list((tmp_path/'out').rglob('report.dcm'))) == 1
    finally: del KINDS['toy-spine']
