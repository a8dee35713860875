"""What a batch may be, epochs, and batches that run out."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.utils.data import DataLoader, TensorDataset

from pyro_kd import Distiller, errors
from pyro_kd.training import (
    ELBOObjective,
    Trainer,
)
from tests.support.losses import SurrogateKD
from tests.support.training_programs import fast_sgd, gaussian, mean, point, quiet_fit


def test_tensors_tuples_lists_and_mappings_are_batches():
    seen = []

    def model(x, y=None):
        seen.append((x.shape, None if y is None else y.shape))
        pyro.sample("z", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0), obs=torch.tensor(1.0))

    for batch in (torch.zeros(3), (torch.zeros(3),), [torch.zeros(3)], {"x": torch.zeros(3)}):
        seen.clear()
        quiet_fit(Trainer(ELBOObjective(Trace_ELBO(), model, lambda *a, **k: None), fast_sgd), batches=[batch], steps=1)
        assert set(seen) == {(torch.Size([3]), None)}
    seen.clear()
    quiet_fit(
        Trainer(ELBOObjective(Trace_ELBO(), model, lambda *a, **k: None), fast_sgd),
        batches=[(torch.zeros(3), torch.zeros(2))],
    )
    assert set(seen) == {(torch.Size([3]), torch.Size([2]))}


def test_batches_are_repeated_in_every_epoch():
    loader = DataLoader(TensorDataset(torch.arange(10.0)), batch_size=4, shuffle=True)
    seen = []

    def student(x):
        seen.append(tuple(x.tolist()))
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0))

    quiet_fit(Distiller(student, point(0.5), fast_sgd, SurrogateKD(["x"])), batches=loader, steps=6)
    steps = seen[1:-1]  # the first is a look at the parameters, the last one at what has become of them
    assert sorted(sum(steps[:3], ())) == sorted(sum(steps[3:], ())) == list(range(10))
    assert seen[0] == steps[0]


def test_batches_that_run_out_are_an_error():
    distiller = Distiller(lambda x: mean(), lambda x: gaussian(3.0)(), fast_sgd, SurrogateKD(["x"]))
    with pytest.raises(errors.BatchesExhaustedError, match="ran out at step 4, after 3 of them.*fewer steps"):
        quiet_fit(distiller, batches=iter([torch.zeros(1)] * 3), steps=10)
    assert distiller.num_steps == 3
    with pytest.raises(errors.BatchesExhaustedError, match="ran out at step 4, after 0"):
        quiet_fit(distiller, batches=[], steps=10)
    with pytest.raises(TypeError, match="steps is needed"):
        quiet_fit(distiller, batches=iter([]))
    with pytest.raises(TypeError, match="not both"):
        quiet_fit(distiller, 1, batches=[1], steps=2)
