"""SurrogateKD and LocalKD: values, gradients, Pyro's and PyTorch's loops, terms by site, options."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import nn

from models.helmholtz import HelmholtzMachine
from pyro_kd import LocalKD, SurrogateKD, freeze
from pyro_kd.divergences import kl, wasserstein2

both = pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])


def chain(weight, scale=0.5):
    """z1 -> z2 -> x, continuous, with parameters given as tensors."""

    def program(n=50):
        with pyro.plate("rows", n):
            z1 = pyro.sample("z1", dist.Normal(weight[0], 1.0))
            z2 = pyro.sample("z2", dist.Normal(torch.tanh(weight[1] * z1), weight[2].exp()))
            return pyro.sample("x", dist.Normal(weight[3] * z2, scale))

    return program


def vector_program(width, name="decoder"):
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 3))

    def program(n=32):
        pyro.module(name, net)
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.5).to_event(1))

    return program, net


# The values of the two bounds.


def test_bounds_of_the_gaussian_example(float64):
    """z ~ N(0, 1), y ~ N(z, s^2), a student whose mean of z is off by delta: the closed forms are in the docstring of LocalKD."""
    delta, s = 0.7, 0.5

    def program(mean):
        def model():
            with pyro.plate("rows", 1000):
                z = pyro.sample("z", dist.Normal(mean, 1.0))
                pyro.sample("y", dist.Normal(z, s))

        return model

    teacher, student = program(torch.tensor(0.0)), program(torch.tensor(delta))
    surrogate = SurrogateKD(["y"], latent_weight=0.0).loss(student, teacher) / 1000
    local = LocalKD(["y"]).loss(student, teacher) / 1000
    truth = float(kl(dist.Normal(0.0, (1 + s**2) ** 0.5), dist.Normal(delta, (1 + s**2) ** 0.5), torch.tensor(0.0)))
    assert surrogate == pytest.approx(delta**2 / (2 * s**2))
    assert local == pytest.approx(delta**2 / 2)
    assert truth == pytest.approx(delta**2 / (2 * (1 + s**2)))


@both
def test_the_loss_is_0_where_student_equals_teacher(loss):
    program = chain(torch.tensor([0.3, 1.0, -0.5, 2.0]))
    terms = loss(["x"]).terms(program, program)
    assert {name: term.value.item() for name, term in terms.items()} == {"z1": 0.0, "z2": 0.0, "x": 0.0}


@both
def test_the_loss_is_0_where_student_equals_teacher_with_discrete_latents(loss):
    torch.manual_seed(0)
    program = HelmholtzMachine(4).model
    assert all(term.value.item() == 0.0 for term in loss(["y1", "y2"]).terms(program, freeze(program), 100).values())


def test_an_autoregressive_target_depends_on_the_teachers_values():
    """y2 depends on z1 and y1. In the student, these are its own z1 and the teacher's y1 (y_<j in Eq. 4)."""
    seen = {}

    def program(shift, label):
        def model():
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            y1 = pyro.sample("y1", dist.Normal(z, 1.0))
            seen[label] = z, y1
            pyro.sample("y2", dist.Normal(z + 10 * y1, 1.0))

        return model

    loss = SurrogateKD(["y1", "y2"], latent_weight=0.0)
    run = loss.particles(program(5.0, "student"), program(0.0, "teacher"))[0].run
    (z_teacher, y_teacher), (z_student, y_student) = seen["teacher"], seen["student"]
    assert torch.allclose(z_student, z_teacher + 5.0)
    assert torch.equal(y_student, y_teacher)
    y2 = run.pairs[-1]
    assert torch.equal(y2.q.loc, z_student + 10 * y_teacher)
    assert torch.equal(y2.p.loc, z_teacher + 10 * y_teacher)


def test_local_gives_the_teachers_latents():
    run = LocalKD(["x"]).particles(chain(torch.ones(4)), chain(torch.zeros(4)))[0].run
    assert [pair.name for pair in run.pairs] == ["z1", "z2", "x"]
    for pair in run.pairs:
        assert torch.equal(pair.value, pair.student_value)


# Gradients.


def test_surrogate_gradient_equals_finite_differences_at_frozen_noise(float64):
    teacher = chain(torch.tensor([0.0, 1.0, -0.7, 2.0]))
    weight = torch.tensor([0.3, 0.8, -0.5, 1.5], requires_grad=True)
    loss = SurrogateKD(["x"], latent_weight=lambda name: {"z1": 0.5, "z2": 2.0}[name])

    def value(w):
        pyro.set_rng_seed(7)
        return loss.differentiable_loss(chain(w), teacher)

    (gradient,) = torch.autograd.grad(value(weight), weight)
    for i in range(4):
        step = torch.zeros(4)
        step[i] = 1e-6
        with torch.no_grad():
            numerical = (value(weight + step) - value(weight - step)) / 2e-6
        assert gradient[i] == pytest.approx(float(numerical), rel=1e-5)


def test_discrete_latents_are_trained_only_by_the_latent_loss():
    teacher = freeze(HelmholtzMachine(4).model)

    def gradients(**options):
        student = HelmholtzMachine(16)
        # Both programs start at 0, where the latent loss has no gradient.
        torch.nn.init.constant_(student.generative.z4, 0.5)
        pyro.clear_param_store()
        SurrogateKD(["y1", "y2"], **options).loss_and_grads(student.model, teacher, 200)
        groups = dict.fromkeys(("z4", "z3", "z2", "z1", "y2", "y1"), 0.0)
        for name, p in student.generative.named_parameters():
            groups[name.split(".")[0]] += 0.0 if p.grad is None else float(p.grad.abs().sum())
        return groups

    surrogate_only = gradients(latent_weight=0.0)
    assert surrogate_only["y1"] > 0
    assert surrogate_only["y2"] > 0
    assert all(surrogate_only[name] == 0 for name in ("z1", "z2", "z3", "z4"))
    assert all(value > 0 for value in gradients(latent_weight=1.0).values())


def test_the_teacher_gets_no_gradient():
    teacher, net = vector_program(5, "teacher")
    student, _ = vector_program(3, "student")
    module = SurrogateKD(["x"])(student, teacher)
    module().backward()
    assert all(p.grad is None for p in net.parameters())

    class Leaf(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3))

        def forward(self):
            pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1))

    with pyro.settings.context(module_local_params=True):
        leaf, other = Leaf(), Leaf()
        SurrogateKD(["x"])(other, leaf)().backward()
    assert leaf.loc.grad is None  # although the parameter itself is the location of the distribution
    assert leaf.loc.requires_grad
    assert other.loc.grad is not None


@both
def test_the_loss_is_averaged_over_particles(loss):
    teacher, student = chain(torch.tensor([0.0, 1.0, -0.7, 2.0])), chain(torch.tensor([0.3, 0.8, -0.5, 1.5]))
    one = [loss(["x"]).loss(student, teacher) for _ in range(200)]
    many = loss(["x"], num_particles=200).loss(student, teacher)
    vectorized = loss(["x"], num_particles=200, vectorize_particles=True).loss(student, teacher)
    mean, error = torch.tensor(one).mean(), torch.tensor(one).std() / 200**0.5
    assert abs(many - mean) < 5 * 2**0.5 * error
    assert abs(vectorized - mean) < 5 * 2**0.5 * error


def test_vectorized_particles_equal_a_batch(float64):
    """Two particles of 50 rows in one plate: the same draws as the plate of shape (2, 50), and half their sum."""
    teacher, student = chain(torch.tensor([0.0, 1.0, -0.7, 2.0])), chain(torch.tensor([0.3, 0.8, -0.5, 1.5]))
    loss = SurrogateKD(["x"], num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    pyro.set_rng_seed(3)
    vectorized = loss.loss(student, teacher)
    outer = pyro.plate("outer", 2, dim=-2)
    pyro.set_rng_seed(3)
    batch = SurrogateKD(["x"]).loss(outer(student), outer(teacher))
    assert vectorized == pytest.approx(batch / 2)
    guessing = SurrogateKD(["x"], num_particles=2, vectorize_particles=True)
    guessing.loss(student, teacher)
    assert guessing.max_plate_nesting == 2


# The loops.


@both
def test_svi_and_plain_torch_take_the_same_steps(loss, float64):
    teacher, _ = vector_program(6)
    frozen = freeze(teacher)
    student, net = vector_program(3)
    start = copy.deepcopy(net.state_dict())
    pyro.set_rng_seed(1)
    svi = SVI(student, frozen, Adam({"lr": 0.01}), loss(["x"]))
    by_svi = [svi.step(16) for _ in range(5)]
    after_svi = copy.deepcopy(net.state_dict())
    net.load_state_dict(start)
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    module = loss(["x"])(student, frozen)
    optim = torch.optim.Adam(net.parameters(), lr=0.01)
    by_torch = []
    for _ in range(5):
        optim.zero_grad()
        value = module(16)
        value.backward()
        optim.step()
        by_torch.append(value.item())
    assert by_svi == pytest.approx(by_torch)
    for name, value in net.state_dict().items():
        assert torch.allclose(value, after_svi[name]), name


def test_the_module_has_only_the_students_parameters():
    teacher, student = HelmholtzMachine(8), HelmholtzMachine(2)

    class Program(nn.Module):
        def __init__(self, machine):
            super().__init__()
            self.machine = machine

        def forward(self, n):
            return self.machine.model(n)

    module = SurrogateKD(["y1", "y2"])(Program(student), Program(teacher))
    assert set(module.parameters()) == set(student.parameters())
    teacher.train()
    module.eval()
    assert teacher.training
    assert not student.training
    module.to(torch.float64)
    assert next(teacher.parameters()).dtype == torch.float64
    assert set(module.state_dict()) == {"student.machine." + name for name in student.state_dict()}


def test_inputs_are_passed_as_arguments():
    net = nn.Linear(3, 1)

    def student(x, *, shift):
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1) + shift, 1.0))

    def teacher(x, *, shift):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x.sum(-1) + shift, 1.0))

    svi = SVI(student, teacher, Adam({"lr": 0.1}), SurrogateKD(["y"]))
    for _ in range(200):
        svi.step(torch.randn(64, 3), shift=2.0)
    assert torch.allclose(net.weight, torch.ones(1, 3), atol=0.05)
    assert svi.evaluate_loss(torch.randn(64, 3), shift=2.0) < 0.2


@pytest.mark.filterwarnings("ignore:pyro.factor .* has no part in the loss")
def test_observed_sites_are_targets_and_only_the_shape_of_their_data_counts():
    def program(loc):
        def model(data):
            with pyro.plate("rows", len(data)):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=data)
                pyro.deterministic("twice", 2 * z)
                pyro.factor("potential", -z)

        return model

    loss = SurrogateKD()
    data = torch.full((5,), 1e6)
    terms = loss.terms(program(1.0), program(0.0), data)
    assert {name: term.kind for name, term in terms.items()} == {"z": "latent", "x": "target"}
    assert float(terms["x"].value) == pytest.approx(2.5)
    run = loss.particles(program(1.0), program(0.0), data)[0].run
    assert run.pairs[1].value.abs().max() < 100


def test_targets_by_name_and_by_predicate():
    teacher, student = chain(torch.zeros(4)), chain(torch.ones(4))
    assert SurrogateKD("x").terms(student, teacher)["x"].kind == "target"
    kinds = SurrogateKD(lambda site: site["name"] != "z1").terms(student, teacher)
    assert [term.kind for term in kinds.values()] == ["latent", "target", "target"]


def test_targets_do_not_need_shared_noise():
    def program(loc):
        def model():
            pyro.sample("count", dist.NegativeBinomial(5.0, loc))

        return model

    terms = SurrogateKD(["count"]).terms(program(torch.tensor(0.5)), program(torch.tensor(0.3)))
    assert terms["count"].analytic is False


# Terms and options.


def test_terms_add_up_to_the_loss():
    teacher, student = chain(torch.tensor([0.0, 1.0, -0.7, 2.0])), chain(torch.tensor([0.3, 0.8, -0.5, 1.5]))
    loss = SurrogateKD(["x"], latent_weight={"z1": 0.0, "z2": 3.0}, num_particles=2)
    pyro.set_rng_seed(5)
    terms = loss.terms(student, teacher)
    pyro.set_rng_seed(5)
    assert sum(term.weight * float(term.value) for term in terms.values()) == pytest.approx(loss.loss(student, teacher))
    assert list(terms) == ["z1", "z2", "x"]
    assert terms["z1"].weight == 0
    assert float(terms["z1"].value) == pytest.approx(50 * 0.3**2 / 2)
    assert all(term.analytic for term in terms.values())
    assert {term.divergence for term in terms.values()} == {"kl"}


def test_latent_reduction_mean_divides_by_the_event():
    teacher, _ = vector_program(4)
    loss = {r: SurrogateKD(["x"], latent_reduction=r) for r in ("sum", "mean")}

    def shifted(n=32):
        with pyro.plate("rows", n):
            pyro.sample("z", dist.Normal(torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(3), 0.5).to_event(1))

    values = {r: float(loss[r].terms(shifted, freeze(teacher))["z"].value) for r in loss}
    assert values["sum"] == pytest.approx(32.0)
    assert values["mean"] == pytest.approx(16.0)


def test_a_users_own_divergence():
    calls = []

    def absolute(p, q, value):
        calls.append(value.shape)
        return (p.mean - q.mean).abs()

    terms = SurrogateKD(["x"], divergence=absolute, latent_divergence=wasserstein2).terms(
        chain(torch.ones(4)), chain(torch.zeros(4))
    )
    assert terms["x"].divergence == "absolute"
    assert terms["x"].analytic is None
    assert terms["z1"].divergence == "wasserstein2"
    assert float(terms["z1"].value) == pytest.approx(50.0)
    assert calls == [torch.Size([50])]


def test_scale_and_mask_enter_as_in_an_elbo():
    mask = torch.arange(50) < 10

    def scaled(weight):
        return poutine.scale(poutine.mask(chain(weight), mask=mask), scale=3.0)

    plain = SurrogateKD(["x"], latent_weight=0.0)
    assert float(plain.terms(scaled(torch.ones(4)), scaled(torch.zeros(4)))["z1"].value) == pytest.approx(10 * 3.0 / 2)

    def masked_distribution(loc):
        def model():
            with pyro.plate("rows", 50):
                pyro.sample("x", dist.Normal(loc, 1.0).mask(mask))

        return model

    assert plain.loss(masked_distribution(1.0), masked_distribution(0.0)) == pytest.approx(5.0)


def test_subsampled_plates_share_indices_and_scale():
    data = torch.arange(100.0)

    def program(loc):
        def model():
            with pyro.plate("data", 100, subsample_size=10) as index:
                pyro.sample("x", dist.Normal(data[index] + loc, 1.0))

        return model

    for loss in (SurrogateKD(["x"]), LocalKD(["x"])):
        assert loss.loss(program(2.0), program(0.0)) == pytest.approx(100 * 2.0)


def test_delta_sites_are_compared_by_the_squared_distance():
    def program(shift):
        def model():
            feature = pyro.sample("feature", dist.Delta(torch.zeros(3) + shift, event_dim=1))
            pyro.sample("x", dist.Normal(feature.sum(), 1.0))

        return model

    terms = SurrogateKD(["x"]).terms(program(2.0), program(0.0))
    assert terms["feature"].divergence == "wasserstein2"
    assert float(terms["feature"].value) == pytest.approx(12.0)


def test_site_map_and_fresh_pair_sites_and_leave_them_alone():
    def teacher():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("mine", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))

    def student():
        pyro.sample("extra", dist.Normal(0.0, 1.0))
        z = pyro.sample("latent", dist.Normal(1.0, 1.0))
        pyro.sample("output", dist.Normal(z, 1.0))

    for loss in (SurrogateKD, LocalKD):
        terms = loss(["x"], site_map={"latent": "z", "output": "x"}, fresh=["extra", "mine"]).terms(student, teacher)
        assert list(terms) == ["z", "x"]
        assert float(terms["z"].value) == pytest.approx(0.5)


def test_one_loss_serves_several_pairs():
    """What is known about an unfrozen teacher must not leak into the next pair."""
    first, _ = vector_program(4, "first")
    second, net = vector_program(3, "second")
    third, _ = vector_program(2, "third")
    loss = SurrogateKD(["x"])
    loss.differentiable_loss(third, second).backward()
    assert all(p.grad is None for p in net.parameters())
    loss.differentiable_loss(second, first).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_call_of_the_loss_changes_only_the_random_stream():
    teacher, _ = vector_program(4)
    frozen = freeze(teacher)
    student, net = vector_program(3)
    before = copy.deepcopy(net.state_dict())
    SurrogateKD(["x"]).loss(student, frozen)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_observed_sites_that_are_not_targets_are_inputs():
    """Both programs keep their value, and they have no term."""

    def program(weight):
        def model(x):
            with pyro.plate("rows", len(x)):
                x = pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
                pyro.sample("y", dist.Normal(weight * x, 1.0))

        return model

    terms = SurrogateKD(["y"]).terms(program(2.0), program(1.0), torch.full((4,), 10.0))
    assert {name: term.value.item() for name, term in terms.items()} == {"y": pytest.approx(4 * 100 / 2)}


def test_a_conditioned_teacher_conditions_the_student():
    teacher, student = chain(torch.zeros(4)), chain(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    fixed = pyro.condition(teacher, data={"z2": torch.full((50,), 3.0)})
    terms = SurrogateKD(["x"]).terms(student, fixed)
    assert list(terms) == ["z1", "x"]
    assert terms["x"].value.item() == pytest.approx(50 * 3.0**2 / (2 * 0.5**2))


def test_deterministic_values_are_the_students_own():
    seen = {}

    def program(loc, label):
        def model():
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            seen[label] = pyro.deterministic("double", 2 * z)
            pyro.sample("x", dist.Normal(seen[label], 1.0))

        return model

    SurrogateKD(["x"]).loss(program(1.0, "student"), program(0.0, "teacher"))
    assert torch.allclose(seen["student"], seen["teacher"] + 2.0)


def test_autoguides_are_compared_at_their_auxiliary_sites():
    """Pyro's autoguides write each latent as a Delta of an auxiliary draw: only that draw has a term."""
    from pyro.infer.autoguide import AutoNormal

    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.LogNormal(0.0, 1.0))

    teacher, student = AutoNormal(model, init_scale=0.5), AutoNormal(model, init_scale=0.1)
    teacher()
    frozen = freeze(teacher)
    pyro.clear_param_store()
    terms = SurrogateKD(["a_unconstrained"]).terms(student, frozen)
    assert {name: term.kind for name, term in terms.items()} == {"a_unconstrained": "target", "b_unconstrained": "latent"}


def test_a_delta_beside_auxiliary_sites_keeps_its_term():
    def program(shift):
        def model():
            e = pyro.sample("e", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("feature", dist.Delta(torch.zeros(2) + shift, event_dim=1))
            pyro.sample("x", dist.Delta(e + shift))

        return model

    terms = SurrogateKD(["x"]).terms(program(2.0), program(0.0))
    assert list(terms) == ["e", "feature", "x"]
    assert terms["feature"].value.item() == pytest.approx(8.0)
    assert terms["x"].value.item() == pytest.approx(4.0)  # GAN distillation, Eq. 9


def test_a_latent_of_an_autoguide_can_be_a_target():
    from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.LogNormal(0.0, 1.0))

    for guide in (AutoNormal, AutoDiagonalNormal):
        pyro.clear_param_store()
        teacher = guide(model)
        teacher()
        frozen = freeze(teacher)
        pyro.clear_param_store()
        terms = SurrogateKD(["a", "b"]).terms(guide(model), frozen)
        assert [terms[name].kind for name in ("a", "b")] == ["target", "target"]


def test_any_exception_between_particles_leaves_no_gradient():
    w, calls = pyro.param("w", torch.tensor(0.0)), []

    def student():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("mine")
        pyro.sample("x", dist.Normal(pyro.param("w"), 1.0))

    with pytest.raises(KeyError, match="mine"):
        SurrogateKD(["x"], num_particles=2).loss_and_grads(student, lambda: pyro.sample("x", dist.Normal(3.0, 1.0)))
    assert w.grad is None


def test_the_parameters_of_a_bound_method_are_those_of_its_module():
    machine = HelmholtzMachine(2)
    module = SurrogateKD(["y1", "y2"])(machine.model, freeze(HelmholtzMachine(4).model))
    assert set(module.parameters()) == set(machine.parameters())
    module.to(torch.float64)
    assert next(machine.parameters()).dtype == torch.float64
    assert module.teacher._tensors[0].dtype == torch.float64


def test_inputs_with_gradients_are_not_shared_parameters():
    encoder = nn.Linear(2, 2)

    def program(net):
        def model(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0))

        return model

    student, teacher = nn.Linear(2, 1), nn.Linear(2, 1)
    SurrogateKD(["y"])(program(student), program(teacher))(encoder(torch.randn(5, 2))).backward()
    assert encoder.weight.grad is not None
    assert teacher.weight.grad is None


def test_an_unfrozen_teachers_parameter_that_appears_later_gets_no_gradient():
    w, v = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)

    def teacher(late):
        pyro.sample("x", dist.Normal(w if late else torch.tensor(1.0), 1.0))

    module = SurrogateKD(["x"])(lambda late: pyro.sample("x", dist.Normal(v, 1.0)), teacher)
    module(False).backward()
    module(True).backward()
    assert w.grad is None
    assert v.grad == -2.0


def test_fresh_sites_of_both_programs_have_no_term():
    def program(loc):
        def model():
            own = pyro.sample("own", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(0 * own, 1.0))
            return own

        return model

    for loss in (SurrogateKD(["x"], fresh=["own"]), LocalKD(["x"], fresh=["own"])):
        run = loss.particles(program(5.0), program(0.0))[0].run
        assert [pair.name for pair in run.pairs] == ["x"]
        teacher, student = run.teacher.nodes["own"]["value"], run.student.nodes["own"]["value"]
        assert not torch.allclose(student, teacher)
        assert not torch.allclose(student, teacher + 5.0)


def test_guessing_the_plates_does_not_change_batch_statistics():
    norm = nn.BatchNorm1d(1)

    def student():
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(norm(z.reshape(-1, 1)).reshape(z.shape), 1.0))

    loss = SurrogateKD(["x"], num_particles=2, vectorize_particles=True)
    loss._guess_max_plate_nesting(student, freeze(student), (), {})
    assert norm.num_batches_tracked == 0
    assert norm.training


def test_retain_graph_allows_a_second_backward():
    shared = torch.tensor(1.0, requires_grad=True)
    square = shared**2

    def student():
        pyro.sample("x", dist.Normal(square, 1.0))

    loss = SurrogateKD(["x"], retain_graph=True)
    for _ in range(2):
        loss.loss_and_grads(student, chain_free)
    assert shared.grad == 4.0
    with pytest.raises(RuntimeError, match="second time"):
        for _ in range(2):
            SurrogateKD(["x"]).loss_and_grads(student, chain_free)


def chain_free():
    pyro.sample("x", dist.Normal(0.0, 1.0))


# Special cases of the paper's section 3.5, each written in one line by the user.


def test_vanilla_distillation_of_a_classifier():
    """No latents: the KL between class probabilities."""
    x, p, q = torch.randn(20, 4), torch.randn(4, 3), torch.randn(4, 3)

    def classifier(weight):
        def model(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("label", dist.Categorical(logits=x @ weight))

        return model

    expected = torch.nn.functional.kl_div((x @ q).log_softmax(-1), (x @ p).log_softmax(-1), reduction="sum", log_target=True)
    assert SurrogateKD(["label"]).loss(classifier(q), classifier(p), x) == pytest.approx(float(expected), rel=1e-5)


def test_sequence_level_distillation():
    """Fully visible and autoregressive (Eq. 3): the student follows the teacher's sequence."""

    def language_model(stay):
        def model():
            word = torch.tensor(0)
            for t in range(4):
                word = pyro.sample(f"word_{t}", dist.Bernoulli(torch.where(word > 0, stay, 1 - stay)))

        return model

    teacher, student = language_model(torch.tensor(0.9)), language_model(torch.tensor(0.6))
    each = kl(dist.Bernoulli(torch.tensor(0.9)), dist.Bernoulli(torch.tensor(0.6)), torch.tensor(1.0))
    loss = SurrogateKD(lambda site: site["name"].startswith("word"))
    assert loss.loss(student, teacher) == pytest.approx(4 * float(each))


def test_a_module_whose_parameters_are_partly_in_the_store_warns():
    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def forward(self):
            scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
            pyro.sample("x", dist.Normal(self.loc, scale))

    module = SurrogateKD(["x"])(Program(), lambda: pyro.sample("x", dist.Normal(1.0, 1.0)))
    with pytest.warns(UserWarning, match="does not reach pyro.param 'scale'"):
        module()
    module().backward()  # warns only once
