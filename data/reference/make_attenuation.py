"""Mass attenuation of the body's materials, metals, scintillator and air -> attenuation.csv.

Run:    pip install -c constraints.txt -e ".[physics]" && python data/reference/make_attenuation.py
Source: elemental cross sections of Elam, Ravel & Sieber 2002 (Radiat. Phys. Chem. 63, 121) as tabulated by xraydb,
        total with coherent scatter; mixtures by mass fraction. Compositions: ICRU Report 44 (1989) skeletal muscle and
        adipose tissue; NIST dry air; hydroxyapatite Ca10(PO4)6(OH)2; ASTM F136 Ti-6Al-4V and F75 CoCrMo; CsI with .3 mol % Tl.
"""
import csv
from pathlib import Path

import numpy as np
import xraydb

KEV = np.arange(10, 141, 5)  # bin centres; a bin reaches 2.5 keV to either side


def by_mass(**atoms):  # atoms in the formula -> mass fractions
    mass = {k: n*xraydb.atomic_mass(k) for k, n in atoms.items()}
    return {k: m/sum(mass.values()) for k, m in mass.items()}


MATERIALS = {
    'ha': by_mass(Ca=10, P=6, O=26, H=2),
    'lean': dict(H=.102, C=.143, N=.034, O=.710, Na=.001, P=.002, S=.003, Cl=.001, K=.004),  # ICRU-44 skeletal muscle
    'fat': dict(H=.114, C=.598, N=.007, O=.278, Na=.001, S=.001, Cl=.001),                   # ICRU-44 adipose tissue
    'ti': dict(Ti=.90, Al=.06, V=.04),
    'cocr': dict(Co=.66, Cr=.28, Mo=.06),
    'water': by_mass(H=2, O=1),
    'air': dict(C=.000124, N=.755268, O=.231781, Ar=.012827),
    'al': dict(Al=1), 'cu': dict(Cu=1),
    'csi': by_mass(Cs=1, I=1, Tl=.003),
}


def mu(material, kev):  # cm2/g
    return sum(w*xraydb.mu_elam(el, np.atleast_1d(kev)*1e3) for el, w in MATERIALS[material].items())


def binned(material):
    "At the bin's centre; for CsI, whose K edges (33.2 and 36.0 keV) fall inside bins, the mean over the bin."
    if material != 'csi': return mu(material, KEV)
    return np.array([mu(material, np.arange(k - 2.45, k + 2.5, .1)).mean() for k in KEV])


if __name__ == '__main__':
    table = {m: binned(m) for m in MATERIALS}
    with open(Path(__file__).with_name('attenuation.csv'), 'w', newline='') as f:
        f.write('# mass attenuation with coherent scatter, cm2/g, at keV; made by make_attenuation.py from the Elam tables in xraydb '
                + xraydb.__version__.split('+')[0] + '\n')
        w = csv.writer(f, lineterminator='\n')
        w.writerow(['kev', *table])
        for i, k in enumerate(KEV): w.writerow([k, *(f'{t[i]:.5g}' for t in table.values())])
