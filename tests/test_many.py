"""A cohort's pairs are the same bytes whoever makes them: one process, two, a scheduler elsewhere, with a worker killed, stopped and gone on."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest

from bmd_xray.cli import main
from bmd_xray.cohort import sample_cohort
from bmd_xray.core import InputError
from bmd_xray.many import Settings, build_pairs, parse_cohort
from bmd_xray.results import read_pairs
from bmd_xray.study import write_study

COHORT, SETTINGS = "synthetic:institution=2,n=4", Settings(size=(64, 32), spacing_mm=5., occasions=("pre",), objects=True, kinds=("volume",), truth=("all",))
WORDS = ["--size", "64", "32", "--spacing", "5", "--occasions", "pre", "--objects", "--kinds", "volume", "--truth", "all"]


def contents(out):
    "Every file but the manifest, which says when and where."
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != "manifest.json"}


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    out = tmp_path_factory.mktemp("serial")/"pairs"
    report = build_pairs(parse_cohort(COHORT), out, SETTINGS)
    assert [report[k] for k in ("built", "kept", "failed", "images")] == [4, 0, 0, 8]
    return contents(out)


@pytest.fixture(scope="module")
def scheduler():
    "A dask scheduler with two workers in a process of its own."
    code = "import sys; from distributed import LocalCluster\n" \
           "if __name__ == '__main__':\n" \
           "    with LocalCluster(n_workers=2, threads_per_worker=1, host='127.0.0.1', dashboard_address='127.0.0.1:0', silence_logs=50) as c:\n" \
           "        print(c.scheduler_address, flush=True); sys.stdin.read()"
    env = os.environ | dict(NUMBA_NUM_THREADS="1", OMP_NUM_THREADS="1", DASK_LOGGING__DISTRIBUTED="critical")
    p = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    yield p.stdout.readline().strip()
    p.stdin.close()
    p.wait(30)


def kill_a_busy_worker(address, out, told):
    "Once a patient is done, kill a worker that has one in hand."
    from distributed import Client
    with Client(address, set_as_default=False) as client:
        pids = client.run(os.getpid)
        while not [p for p in out.glob("I2-*")]: time.sleep(.02)
        busy = [w for w, tasks in client.processing().items() if tasks]
        done = len(list(out.glob("I2-*")))
        if busy:
            os.kill(pids[busy[0]], signal.SIGKILL)
            told.update(done=done, pid=pids[busy[0]])


def test_a_scheduler_elsewhere_and_a_killed_worker(serial, scheduler, tmp_path):
    assert build_pairs(parse_cohort(COHORT), tmp_path/"a", SETTINGS, scheduler=scheduler)["built"] == 4
    assert contents(tmp_path/"a") == serial
    told = {}
    killer = threading.Thread(target=kill_a_busy_worker, args=(scheduler, tmp_path/"b", told))
    killer.start()
    report = build_pairs(parse_cohort(COHORT), tmp_path/"b", SETTINGS, scheduler=scheduler)
    killer.join()
    assert told["done"] < 4, "the worker was killed too late to matter"
    with pytest.raises(ProcessLookupError): os.kill(told["pid"], 0)
    assert [report[k] for k in ("built", "failed")] == [4, 0]
    assert contents(tmp_path/"b") == serial


def test_two_workers_stopped_and_gone_on(serial, tmp_path):
    out = tmp_path/"pairs"
    longer = COHORT.replace("n=4", "n=10") # so that a busy machine cannot finish them before it hears the signal
    words = [sys.executable, "-c", "import sys; from bmd_xray.cli import main; sys.exit(main(sys.argv[1:]))", "pairs", longer, "--out", str(out), *WORDS]
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # where the tests run in the background, Ctrl-C is ignored
    p = subprocess.Popen([*words, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds)
    while p.poll() is None and not list(out.glob("I2-*")): time.sleep(.05)
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=120)
    done = {f.name for f in out.glob("I2-*")}
    assert (p.returncode, said[0]) == (130, "") and said[1].strip() == "bmdx: interrupted; what was finished is kept", said
    assert 1 <= len(done) < 10 and not list(out.glob(".*")) and json.loads((out/"manifest.json").read_text())["finished"] is False
    assert set(pd.read_csv(out/"pairs.csv").patient) == done  # what is done can be used
    before = {f: f.stat().st_mtime_ns for d in done for f in (out/d).iterdir()}
    assert main(["pairs", longer, "--out", str(out), *WORDS, "--workers", "1"]) == 0
    found = contents(out)
    assert {f: found[f] for f in serial if "/" in f} == {f: b for f, b in serial.items() if "/" in f}
    assert found["pairs.csv"].startswith(serial["pairs.csv"]) and {f: f.stat().st_mtime_ns for f in before} == before
    assert len(read_pairs(out)) == 20


def test_a_bad_patient_is_reported_and_skipped_and_mended(tmp_path, capsys):
    study, out = tmp_path/"Doe Jane"/"study", tmp_path/"pairs"
    write_study(sample_cohort(3, institution=2), study, pixel_mm=3., spacing_mm=5., body_mm=5.)
    ct, xray = study/"ct/S-200001_pre.nii.gz", study/"xray/S-200003_pre_standing.dcm"
    whole = ct.read_bytes()
    ct.write_bytes(whole[:len(whole)//2])
    xray.rename(tmp_path/"kept.dcm")
    words = ["pairs", str(study), "--out", str(out), "--size", "64", "32", "--occasions", "pre", "--workers", "1"]
    assert main(words) == 3
    assert "1 built" in (said := capsys.readouterr().out) and "2 failed" in said
    failures = pd.read_csv(out/"failures.csv").set_index("patient")
    assert failures.stage.to_dict() == {"S-200001": "views", "S-200003": "read"}
    assert failures.reason["S-200001"].startswith("[ct]: got") and "[xray]" in failures.reason["S-200003"]
    everything = b"".join(contents(out).values()).decode("latin-1") + (out/"manifest.json").read_text()
    for secret in ("Doe", "Jane", "S-200003_pre", str(tmp_path)): assert secret not in everything, secret
    assert set(pd.read_csv(out/"pairs.csv").patient) == {"S-200002"}
    ct.write_bytes(whole)
    (tmp_path/"kept.dcm").rename(xray)
    assert main(words) == 0 and "2 built" in capsys.readouterr().out
    assert (out/"failures.csv").read_text() == "patient,stage,reason\n" and len(read_pairs(out)) == 6


def test_what_the_command_refuses(tmp_path, capsys):
    def refused(*words):
        code = main(["pairs", *map(str, words)])
        err = capsys.readouterr().err
        assert code == 2 and "Traceback" not in err
        return err
    assert "not allowed with" in refused(COHORT, "--out", tmp_path/"x", "--workers", "2", "--scheduler", "tcp://a:1")
    assert "n, institution and seed" in refused("synthetic:n=two", "--out", tmp_path/"x")
    assert "manifest.csv" in refused(tmp_path, "--out", tmp_path/"x")
    assert "expected some of" in refused(COHORT, "--out", tmp_path/"x", "--kinds", "mass")
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"thesis.txt").write_text("years")
    assert "other things" in refused(COHORT, "--out", tmp_path/"mine", "--fresh") and (tmp_path/"mine"/"thesis.txt").exists()
    assert not (tmp_path/"x").exists()


def test_one_run_at_a_time(tmp_path):
    from bmd_xray.many import _only_one
    with _only_one(tmp_path), pytest.raises(InputError, match="another run"), contextlib.ExitStack() as s: s.enter_context(_only_one(tmp_path))
    with _only_one(tmp_path): pass


def test_a_raw_study_holds_what_a_hospital_has(tmp_path):
    import numpy as np

    from bmd_xray.cohort import Cohort
    from bmd_xray.folder import read_cohort
    cohort = Cohort("two hospitals", (*sample_cohort(2, institution=2), *sample_cohort(1)))
    write_study(cohort, tmp_path/"raw", pixel_mm=2., spacing_mm=6., body_mm=8., raw=True)
    forms = [sorted(p.name for p in (tmp_path/"raw/ct").iterdir() if p.name.startswith(f"S-{who}_pre")) for who in (200001, 200002, 100001)]
    assert forms == [["S-200001_pre.json", "S-200001_pre.nii.gz"], ["S-200002_pre"], ["S-100001_pre.json", "S-100001_pre.mha"]]
    read = {p.id: p for p in read_cohort(tmp_path/"raw")}
    for patient, who in zip(cohort, ("S-200001", "S-200002", "S-100001")):
        for when in ("pre", "post"):
            (hu, labels), (true, _) = read[who].raw_ct(when), patient.raw_ct(when, 6.)
            assert labels is None and np.array_equal(hu.array, np.rint(true.array)) and np.allclose(hu.affine, true.affine, atol=1e-4)
            assert read[who].stated_landmarks(when) == {} and (read[who].stated_calibration(when) is None) == (patient.institution == 1)
            shots = [e for e in read[who].exposures() if e.when == when]
            assert [e.position for e in shots] == [e.position for e in patient.exposures() if e.when == when]
            for e in shots: assert (read[who].lateral(e) is not None) == (patient.institution == 2)
        assert read[who].film(shots[0], (32, 16)).std() > 100
    with pytest.raises(InputError, match="no labels"): read["S-200001"].ct("pre")
