"""Wrong input to the losses: each raises a typed error whose message names the site and what to write instead."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

from pyro_kd import LocalKD, errors, freeze
from tests.support.losses import SurrogateKD
from tests.support.wrong_programs import make, normal, raises


def test_every_error_is_also_a_builtin_error():
    own = [getattr(errors, name) for name in errors.__all__ if name != "PyroKDError"]
    assert all(len(cls.__mro__) > 4 and issubclass(cls, errors.PyroKDError) for cls in own)


def test_no_targets_found_is_an_error():
    program = make(z=normal(), x=normal())
    raises(
        errors.NoTargetsError, "observes no site", "'z', 'x'", "SurrogateKD(targets=[...])",
        loss=SurrogateKD(), student=program, teacher=program,
    )  # fmt: skip
    raises(errors.NoTargetsError, "targets is empty", loss=LocalKD([]), student=program, teacher=program)
    raises(
        errors.NoTargetsError, "no site for which targets(site) holds",
        loss=SurrogateKD(lambda site: False), student=program, teacher=program,
    )  # fmt: skip


def test_an_unknown_target_is_an_error():
    program = make(latent=normal(), pixels=normal())
    raises(
        errors.UnknownTargetError, "target 'pixel'", "'latent', 'pixels'", "Did you mean 'pixels'?",
        loss=SurrogateKD(["pixel"]), student=program, teacher=program,
    )  # fmt: skip


def test_a_target_with_obs_mask_is_an_error():
    def program():
        pyro.sample("x", normal(torch.zeros(2)), obs=torch.zeros(2), obs_mask=torch.tensor([True, False]))

    raises(
        errors.UnknownTargetError, "target 'x' is not a sample site", "x_observed and x_unobserved",
        student=program, teacher=program,
    )  # fmt: skip


def test_a_site_in_one_program_only_is_an_error():
    both = make(z=normal(), x=normal())
    raises(
        errors.UnpairedSiteError, "site 'z' is in the teacher only", "the student has 'x'", "fresh=['z']", "site_map=",
        student=make(x=normal()), teacher=both,
    )  # fmt: skip
    raises(
        errors.UnpairedSiteError,
        "site 'latent' is in the teacher only", "site 'latent1' is in the student only", "site_map={'latent1': 'latent'}",
        student=make(latent1=normal(), x=normal()), teacher=make(latent=normal(), x=normal()),
    )  # fmt: skip
    raises(errors.UnpairedSiteError, "site 'x' is in the teacher only", student=make(z=normal()), teacher=both)
    raises(
        errors.UnpairedSiteError, "site 'w' is in the student only", "the teacher has 'x'",
        student=make(w=dist.Delta(torch.tensor(0.0)), x=normal()), teacher=make(x=normal()),
    )  # fmt: skip


def test_different_supports_are_an_error():
    raises(
        errors.SupportMismatchError, "supports differ at site 'x'", "Normal over Real()", "Gamma over GreaterThan", "infinite",
        student=make(x=dist.Gamma(1.0, 1.0)), teacher=make(x=normal()),
    )  # fmt: skip
    raises(
        errors.SupportMismatchError, "site 'x'", "one is discrete, the other continuous",
        student=make(x=normal()), teacher=make(x=dist.Poisson(torch.tensor(1.0))),
    )  # fmt: skip
    raises(
        errors.SupportMismatchError, "site 'x'", "upper_bound=3", "upper_bound=2",
        student=make(x=dist.Categorical(torch.ones(3))), teacher=make(x=dist.Categorical(torch.ones(4))),
    )  # fmt: skip
    raises(
        errors.SupportMismatchError, "site 'x'", "events of shape (3,) against (4,)",
        student=make(x=dist.OneHotCategorical(torch.ones(4))), teacher=make(x=dist.OneHotCategorical(torch.ones(3))),
    )  # fmt: skip
    raises(
        errors.SupportMismatchError, "site 'z'", "fresh=['z']",
        loss=LocalKD(["x"]),
        student=make(z=dist.Beta(1.0, 1.0), x=normal()), teacher=make(z=normal(), x=normal()),
    )  # fmt: skip


def test_the_student_may_have_a_wider_support():
    loss = SurrogateKD(["x"])
    assert loss.loss(make(x=normal()), make(x=dist.Gamma(2.0, 1.0))) != 0


def test_a_distribution_without_a_sampler_is_an_error():
    program = make(angle=dist.VonMises3D(torch.tensor([1.0, 0.0, 0.0])), x=normal())
    raises(
        errors.UnsupportedNoiseError, "site 'angle'", "VonMises3D cannot be sampled", "register_sampler(VonMises3D)",
        student=program, teacher=program,
    )  # fmt: skip


def test_a_parameter_of_both_programs_is_an_error():
    def program():
        pyro.sample("x", normal(pyro.param("loc", torch.tensor(0.0))))

    raises(errors.SharedParameterError, "'loc'", "pyro_kd.freeze(teacher)", student=program, teacher=program)

    def with_module(net):
        def model():
            pyro.module("net", net)
            pyro.sample("x", normal(net(torch.ones(2))).to_event(1))

        return model

    pyro.clear_param_store()
    raises(
        errors.SharedParameterError, "'net.weight'", "the same name in Pyro's parameter store",
        student=with_module(nn.Linear(2, 1)), teacher=with_module(nn.Linear(2, 1)),
    )  # fmt: skip


def test_a_module_in_the_closures_of_both_programs_is_an_error():
    net = nn.Linear(2, 1)

    def program():
        pyro.sample("x", normal(net(torch.ones(2))).to_event(1))

    raises(errors.SharedParameterError, "a parameter of shape (1", "freeze", student=program, teacher=program)
    assert SurrogateKD(["x"]).loss_and_grads(program, freeze(program)) == 0.0

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self):
            program()

    raises(errors.SharedParameterError, "'net.weight'", student=Program(), teacher=Program())


def nan_student(bad_site, value):
    def program():
        weight = pyro.param("w", torch.tensor(1.0))
        for name in ("z1", "z2", "x"):
            loc = weight * (value if name == bad_site else 1.0)
            pyro.sample(name, dist.Normal(loc, 1.0, validate_args=False))

    return program


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("site", "kind"), [("z1", "latent"), ("z2", "latent"), ("x", "target")])
def test_a_loss_that_is_not_finite_is_an_error(site, kind, value):
    teacher = make(z1=normal(), z2=normal(), x=normal())
    student = nan_student(site, value)
    svi = SVI(student, teacher, Adam({"lr": 0.1}), SurrogateKD(["x"]))
    with pytest.raises(
        errors.NonFiniteLossError, match=rf"the \w+ term of {kind} site '{site}' is (NaN|infinite); no update was made"
    ):
        svi.step()
    assert pyro.param("w") == 1.0
    assert pyro.param("w").grad is None
    with pytest.raises(errors.NonFiniteLossError, match=f"site '{site}'"):
        SurrogateKD(["x"])(student, teacher)()


def test_a_gradient_that_is_not_finite_is_an_error():
    def student():
        weight = pyro.param("w", torch.tensor(0.0))
        pyro.sample("x", normal(weight.abs().sqrt()))

    svi = SVI(student, make(x=normal()), Adam({"lr": 0.1}), SurrogateKD(["x"]))
    with pytest.raises(errors.NonFiniteLossError, match="its gradient with respect to parameter 'w' is not"):
        svi.step()
    assert pyro.param("w") == 0.0
    assert pyro.param("w").grad is None


def test_a_student_without_parameters_is_an_error():
    loss = SurrogateKD(["x"])
    student, teacher = make(x=normal()), make(x=normal())
    with pytest.raises(
        errors.NoParametersError, match=r"no parameter of the student.*pyro.param or nn.Module.*torch.no_grad"
    ):
        loss.loss_and_grads(student, teacher)
    with pytest.raises(errors.NoParametersError):
        loss(student, teacher)()
    with torch.no_grad():
        assert loss(student, teacher)() == 0.0
    assert loss.loss(student, teacher) == 0.0


@pytest.mark.parametrize("teacher", [None, {"w": 1}, torch.zeros(3)], ids=["None", "dict", "tensor"])
def test_a_teacher_that_is_not_callable_is_an_error(teacher):
    loss = SurrogateKD(["x"])
    expected = f"the teacher \\(second argument\\) is {type(teacher).__name__} .*nn.Module or PyroModule"
    with pytest.raises(errors.InvalidProgramError, match=expected):
        loss(make(x=normal()), teacher)
    with pytest.raises(errors.InvalidProgramError, match=expected):
        loss.loss(make(x=normal()), teacher)
    with pytest.raises(errors.InvalidProgramError, match="the student"):
        loss(None, make(x=normal()))


def test_sites_that_depend_on_draws_are_an_error():
    def program(p):
        def model():
            if pyro.sample("more", dist.Bernoulli(p)):
                pyro.sample("z", normal())
            pyro.sample("x", normal())

        return model

    raises(
        errors.UnpairedSiteError, "site 'z'", "If draws decide which sites a run has, make the deciding sites targets",
        student=program(1.0), teacher=program(0.0),
    )  # fmt: skip
    raises(
        errors.UnpairedSiteError, "site 'z' is in the teacher only", "make the deciding sites targets",
        student=program(0.0), teacher=program(1.0),
    )  # fmt: skip


def test_a_divergence_that_does_not_return_a_tensor_is_an_error():
    raises(
        errors.UnsupportedDivergenceError, "site 'x'", "returned 0.5, not a tensor",
        loss=SurrogateKD(["x"], divergence=lambda p, q, value: 0.5),
        student=make(x=normal()), teacher=make(x=normal()),
    )  # fmt: skip


def test_a_divergence_that_does_not_apply_is_an_error():
    from pyro_kd.divergences import wasserstein2

    raises(
        errors.UnsupportedDivergenceError, "site 'x': wasserstein2", "not for Gamma",
        loss=SurrogateKD(["x"], divergence=wasserstein2),
        student=make(x=dist.Gamma(1.0, 1.0)), teacher=make(x=dist.Gamma(1.0, 1.0)),
    )  # fmt: skip


def test_a_site_without_a_distribution_is_an_error():
    raises(
        errors.UnsupportedDivergenceError, "site 'x' of the teacher", "not a distribution",
        student=make(x=normal()), teacher=lambda: pyro.sample("x", lambda: torch.randn(())),
    )  # fmt: skip


def test_a_latent_weight_without_an_entry_is_an_error():
    program = make(z1=normal(), z2=normal(), x=normal())
    raises(
        errors.UnknownTargetError, "no entry for the latent site 'z2'", "'z_2'", "Did you mean",
        loss=SurrogateKD(["x"], latent_weight={"z1": 1.0, "z_2": 1.0}), student=program, teacher=program,
    )  # fmt: skip


def test_options_out_of_range_are_an_error():
    with pytest.raises(ValueError, match="latent_reduction must be 'sum' or 'mean', not 'max'"):
        SurrogateKD(["x"], latent_reduction="max")
    with pytest.raises(TypeError, match="targets must be site names, a predicate or None, not 3"):
        SurrogateKD(3)
    assert SurrogateKD(name for name in ("x", "y")).targets == ["x", "y"]
    with pytest.raises(ValueError, match="num_particles must be at least 1"):
        SurrogateKD(["x"], num_particles=0)
