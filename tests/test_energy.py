"""`EnergyCallback`: processor time is always measured, electricity with codecarbon, and an estimate is called one"""

import pickle
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner

from fastai_tl.all import *
from fastai_tl.core import FastaiTLError
from fastai_tl.interop import energy as module


def small_learner(**kwargs):
    torch.manual_seed(0)
    rows = [(torch.randn(8), torch.randn(1)) for _ in range(32)]
    dls = DataLoaders(DataLoader(rows, bs=8, **kwargs), DataLoader(rows, bs=8))
    return Learner(dls, torch.nn.Linear(8, 1), loss_func=torch.nn.MSELoss())


def fit(learn, epochs=1, cb=None, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, cbs=[cb or EnergyCallback(), *kwargs.pop('cbs', ())], **kwargs)
    return learn.energy


@pytest.fixture
def no_codecarbon(monkeypatch):
    monkeypatch.setitem(sys.modules, 'codecarbon', None)


class Meter:
    "A meter that counts 1 kWh for each reading"
    n = 0

    def __init__(self, codecarbon, country=None):
        self.country = country
        self.used = 0

    def read(self):
        self.used += 1
        return dict(kwh=float(self.used), co2_kg=self.used/2, method='estimated by the test', country='Utopia')

    stop = read


@pytest.fixture
def meter(monkeypatch):
    monkeypatch.setattr(module, 'ElectricityMeter', Meter)
    monkeypatch.setattr(module, '_codecarbon', lambda: SimpleNamespace())


class Work(Callback):
    "Uses the processor for some time in each epoch, and stops at an epoch if asked"
    def __init__(self, seconds=.05, stop_at=None):
        self.seconds, self.stop_at = seconds, stop_at

    def before_epoch(self):
        if self.epoch == self.stop_at:
            raise KeyboardInterrupt

    def after_train(self):
        end = time.process_time() + self.seconds
        while time.process_time() < end:
            sum(range(1000))


def test_processor_time_is_that_of_the_process(no_codecarbon):
    learn = small_learner()
    began = time.process_time()
    energy = fit(learn, 3, cbs=[Work(.1)])
    took = time.process_time() - began
    assert .3 <= energy.processor_seconds <= took + .02
    assert energy.kwh is None and energy.co2_kg is None and energy.fits == 1


def test_child_processes_count(no_codecarbon):
    program = 'import time\nend = time.process_time() + .4\nwhile time.process_time() < end: sum(range(1000))'

    class Child(Callback):
        def after_train(self):
            subprocess.run([sys.executable, '-c', program], check=True)

    assert fit(small_learner(), cbs=[Child()]).processor_seconds >= .39


def test_without_codecarbon_a_line_says_how_to_install_it(no_codecarbon, capsys):
    learn = small_learner()
    with learn.no_bar():
        learn.fit(1, cbs=EnergyCallback('TWN'))
    lines = [line for line in capsys.readouterr().out.splitlines() if 'Processor time' in line]
    assert len(lines) == 1 and 'fastai_tl[energy]' in lines[0] and 'not measured' in lines[0]


def test_fits_are_summed_and_a_search_is_not_counted(meter):
    learn = small_learner()
    first = fit(learn, 2)
    assert (first.kwh, first.fits) == (3, 1)  # two epochs and the end
    assert fit(learn, 1).kwh == 5
    before = learn.energy
    learn.add_cb(EnergyCallback())
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=5, show_plot=False, suggest_funcs=())
        learn.get_preds()
        learn.validate()
    assert learn.energy == before
    fit_again = small_learner()
    assert fit(fit_again).kwh == 2


def test_the_epoch_that_was_interrupted_is_not_counted(meter):
    learn = small_learner()
    with pytest.raises(KeyboardInterrupt):
        fit(learn, 4, cbs=[Work(stop_at=2)])
    assert (learn.energy.kwh, learn.energy.fits) == (2, 1)
    assert fit(learn, 1).kwh == 4 and learn.energy.fits == 2


def test_a_cancelled_fit_is_counted(meter):
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch == 1:
                raise CancelFitException

    assert fit(small_learner(), 5, cbs=[Stop()]).kwh >= 2


def test_a_resumed_fit_counts_what_was_used_before(meter, tmp_path):
    file = tmp_path/'checkpoint.safetensors'
    learn = small_learner()
    with pytest.raises(KeyboardInterrupt):
        fit(learn, 4, cbs=[ResumableFit(file), Work(.2, stop_at=2)])
    used = learn.energy
    new = small_learner()  # as in a new process
    energy = fit(new, 4, cbs=[ResumableFit(file)])
    assert energy.fits == 1 and energy.kwh > used.kwh
    assert energy.processor_seconds >= used.processor_seconds >= .4
    assert energy.method == used.method and energy.country == 'Utopia'


def test_the_callback_can_be_pickled_after_a_fit():
    learn, cb = small_learner(), EnergyCallback()
    fit(learn, cb=cb)
    assert pickle.loads(pickle.dumps(cb)).order == cb.order
    assert pickle.loads(pickle.dumps(learn.energy)) == learn.energy


def test_sums():
    a = Energy(1., 2., 3., 4., 'estimated', 'Taiwan', 1)
    b = Energy(10., 20., None, None, '', '', 2)
    both = a + b
    assert (both.processor_seconds, both.wall_seconds, both.kwh, both.co2_kg, both.fits) == (11., 22., 3., 4., 3)
    assert 'not counted' in both.method and 'not counted' in both.explain()
    assert a + Energy() == Energy() + a == a
    assert (a + Energy(0., 0., 1., 1., 'measured (RAPL)', 'Norway', 1)).method == 'estimated; measured (RAPL)'


def test_parts_that_are_not_known_to_be_measured_are_estimated():
    CPU = type('CPU', (), {})
    GPU = type('GPU', (), {})
    RAM = type('RAM', (), {})
    for mode in ('cpu_load', 'constant', None, 'something new'):
        cpu = CPU()
        cpu._mode = mode
        assert module.method_of([RAM(), cpu]).startswith('estimated')
    cpu._mode = 'intel_rapl'
    assert module.method_of([RAM(), cpu]).startswith('measured (processor with RAPL)')
    assert 'rest estimated' in module.method_of([GPU(), RAM()])


# with codecarbon itself

MISSING = 'codecarbon is not installed: pip install "fastai_tl[energy]"'


def test_codecarbon_is_alive_and_writes_no_file(tmp_path, monkeypatch):
    codecarbon = pytest.importorskip('codecarbon', reason=MISSING)
    monkeypatch.chdir(tmp_path)
    learn = small_learner()
    energy = fit(learn, 2, EnergyCallback('TWN'), cbs=[Work(.1)])
    assert energy.kwh > 0 and energy.country == 'Taiwan'
    mix = codecarbon.input.DataSource().get_global_energy_mix_data()['TWN']
    assert energy.co2_kg == pytest.approx(energy.kwh*mix['carbon_intensity']/1000, rel=1e-6)
    assert 'estimated' in energy.method
    world = fit(small_learner(), 1)
    assert world.country == 'the world on average'
    assert not [*tmp_path.iterdir()]


def test_an_unknown_country_is_an_error():
    pytest.importorskip('codecarbon', reason=MISSING)
    for country in ('XXX', 'Taiwan', 'twn', 3):
        with pytest.raises(FastaiTLError):
            EnergyCallback(country)
