"""What is no posterior of a model: each gets an error that names the remedy."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoNormal

from pyro_kd import posterior_predictive
from pyro_kd.errors import InvalidProgramError

X = torch.ones(4)


def model(x):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0))


def vectors(x):
    pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def in_plate(x):
    with pyro.plate("groups", 3):
        pyro.sample("theta", dist.Normal(0.0, 1.0))


def theta_guide(x):
    with pyro.plate("groups", 3):
        pyro.sample("theta", dist.Normal(0.0, 1.0))


def theta_at_the_right(x):
    with pyro.plate("groups", 3, dim=-1):
        pyro.sample("theta", dist.Normal(0.0, 1.0))


def extra_guide(x):
    pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("slop", dist.Normal(0.0, 1.0))


DRAWS = {"slope": torch.zeros(5)}
WHEN_MADE = {
    "no draws": (lambda: posterior_predictive(model, {"slope": torch.zeros(0)}), r"a teacher without draws.*'slope': 0"),
    "no sites": (lambda: posterior_predictive(model, {}), "a teacher without draws"),
    "numbers that differ": (
        lambda: posterior_predictive(model, {"a": torch.zeros(3), "b": torch.zeros(4)}),
        "the same number of draws.*'a': 3, 'b': 4",
    ),
    "no tensors": (
        lambda: posterior_predictive(model, {"slope": [1.0]}),
        r"draws of 'slope' are not tensors.*\(draws, ...\)",
    ),
    "MCMC before its run": (
        lambda: posterior_predictive(model, MCMC(NUTS(model), num_samples=5)),
        r"a teacher without draws.*mcmc.run\(...\)",
    ),
    "no posterior": (lambda: posterior_predictive(model), "the posterior is None.*Pass draws by name"),
    "a number": (lambda: posterior_predictive(model, 3), "the posterior is 3.*Pass draws by name"),
    "two posteriors": (lambda: posterior_predictive(Predictive(model, DRAWS), DRAWS), "takes no second argument"),
    "no model": (lambda: posterior_predictive(dist.Normal(0.0, 1.0), DRAWS), r"the model.*first argument\) is Normal"),
    "an untrained autoguide": (
        lambda: posterior_predictive(model, AutoNormal(model)),
        "AutoNormal has not been trained.*SVI",
    ),
}


@pytest.mark.parametrize("case", WHEN_MADE)
def test_errors_when_the_teacher_is_made(case):
    make, text = WHEN_MADE[case]
    with pytest.raises(InvalidProgramError, match=text):
        make()


IN_A_RUN = {
    "a name that the model lacks": (
        lambda: posterior_predictive(model, {"slope": torch.zeros(5), "slop": torch.zeros(5)}),
        "the posterior has 'slop', which the model does not draw: it has 'slope', 'data', 'y'. Did you mean 'slope'",
    ),
    "a guide with a site more": (
        lambda: posterior_predictive(model, extra_guide),
        "has 'slop', which the model.*is_auxiliary",
    ),
    "a name that the model has": (lambda: posterior_predictive(model, DRAWS, name="y"), "the model has a site 'y'.*name="),
    "draws of a different shape": (
        lambda: posterior_predictive(vectors, {"w": torch.zeros(5, 2)}),
        r"draws of 'w' have shape \(5, 2\), but the model has events of shape \(3,\)",
    ),
    "draws without an event": (
        lambda: posterior_predictive(vectors, {"w": torch.zeros(5)}),
        r"the draws of 'w' have shape \(5,\)",
    ),
    "a plate and a draw for each row": (
        lambda: posterior_predictive(in_plate, {"theta": torch.zeros(5, 3)}, rows=len),
        r"'theta' lies in the plates 'groups'.*Leave out rows.*\.to_event\(1\)",
    ),
    "a plate of the guide and a draw for each row": (
        lambda: posterior_predictive(in_plate, theta_guide, rows=len),
        "'theta' lies in the plates 'groups'.*Leave out rows",
    ),
    "a plate of the guide at a dimension of its own and a draw for each row": (
        lambda: posterior_predictive(in_plate, theta_at_the_right, rows=len),
        r"the guide has a plate of its own at dim=-1.*Leave out rows.*\.to_event\(1\)",
    ),
    "draws without the batch shape of the latent": (
        lambda: posterior_predictive(in_plate, {"theta": torch.zeros(5)}),
        r"'theta' have batch shape \(\), but the model has batch shape \(3,\) there.*one value.*\(draws,\) \+ \(3,\)",
    ),
    "batches of draws and a draw for each row": (
        lambda: posterior_predictive(model, {"slope": torch.zeros(5, 4)}, rows=len),
        r"'slope' have batch shape \(4,\).*Leave out rows",
    ),
}


@pytest.mark.parametrize("case", IN_A_RUN)
def test_errors_in_a_run(case):
    make, text = IN_A_RUN[case]
    with pytest.raises(InvalidProgramError, match=text):
        make()(X)


def test_an_auxiliary_draw_of_a_guide_is_allowed():
    def guide(x):
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("slope", dist.Delta(2 * noise))

    posterior_predictive(model, guide)(X)


@pytest.mark.parametrize("by", ["draws", "guide"])
def test_a_posterior_of_other_groups_than_the_call_has_is_refused(by):
    def model(groups, rows):
        with pyro.plate("groups", groups):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Normal(m.mean(), 1.0))

    def guide(groups, rows):
        with pyro.plate("groups", 3):
            pyro.sample("m", dist.Normal(torch.zeros(3), 1.0))

    posterior = guide if by == "guide" else {"m": torch.randn(10, 3)}
    program = posterior_predictive(model, posterior)
    assert poutine.trace(program).get_trace(3, 4).nodes["y"]["value"].shape == (4,)
    with pytest.raises(
        InvalidProgramError, match=r"values of 'm' have batch shape \(3,\), and the model in this call has \(5,\)"
    ):
        program(5, 4)
