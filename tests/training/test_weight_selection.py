"""A student that starts from some of its teacher's units."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from models.vrnn import VRNN
from pyro_kd import Distiller, LocalKD, freeze
from pyro_kd.errors import WeightSelectionError
from pyro_kd.training import best_start, select_weights

ROWS = 64


def perceptron(width):
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def values_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


class Decoder(nn.Module):
    """z ~ N(0, I), y ~ N(network(z), 0.1)."""

    def __init__(self, width):
        super().__init__()
        self.network = perceptron(width)

    def forward(self, rows):
        pyro.module("decoder", self)
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.network(z), 0.1).to_event(1))


def test_all_layers_choose_the_same_units():
    teacher, student = perceptron(9), perceptron(3)
    assert select_weights(student, teacher, offset=0.5) == []
    units = torch.tensor([1, 4, 7])
    gain = 3**0.5
    torch.testing.assert_close(student[0].weight, teacher[0].weight[units], rtol=0, atol=0)
    torch.testing.assert_close(student[0].bias, teacher[0].bias[units], rtol=0, atol=0)
    torch.testing.assert_close(student[2].weight, gain * teacher[2].weight[units][:, units])
    torch.testing.assert_close(student[4].weight, gain * teacher[4].weight[:, units])
    torch.testing.assert_close(student[4].bias, teacher[4].bias, rtol=0, atol=0)


def test_without_rescaling_the_weights_are_the_teachers():
    teacher, student = perceptron(8), perceptron(4)
    select_weights(student, teacher, rescale=False)
    torch.testing.assert_close(student[4].weight, teacher[4].weight[:, ::2], rtol=0, atol=0)


def test_networks_of_equal_size_become_equal():
    teacher, student = perceptron(5), perceptron(5)
    select_weights(student, teacher, offset=0.9)
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1 / 3, 0.5, 0.999999, 1 - 1e-12])
@pytest.mark.parametrize(("large", "small"), [(12, 4), (9, 6), (7, 7), (10, 1)])
@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3)])
def test_all_gates_choose_the_same_units(cell, gates, large, small, offset):
    teacher, student = cell(2, large), cell(2, small)
    with torch.no_grad():
        teacher.weight_hh.copy_(torch.arange(gates * large * large).view(gates * large, large))
    select_weights(student, teacher, offset=offset, rescale=False)
    found = student.weight_hh.view(gates, small, small).long()
    columns = found[0, 0] % large
    rows = found[:, :, 0].sub(columns[0]) // large - large * torch.arange(gates)[:, None]
    assert torch.equal(rows, columns.expand(gates, small))
    assert columns.unique().numel() == small


@pytest.mark.parametrize("large", [nn.Conv2d(2, 8, 3), nn.ConvTranspose2d(2, 8, 3)], ids=["convolution", "transposed"])
def test_a_convolution_is_rescaled_by_its_inputs(large):
    kind = type(large)
    teacher = nn.Sequential(large, nn.BatchNorm2d(8), kind(8, 1, 3))
    student = nn.Sequential(kind(2, 2, 3), nn.BatchNorm2d(2), kind(2, 1, 3))
    teacher(torch.randn(16, 2, 8, 8))
    select_weights(student, teacher)
    first = (slice(None), slice(None, None, 4)) if kind is nn.ConvTranspose2d else slice(None, None, 4)
    last = slice(None, None, 4) if kind is nn.ConvTranspose2d else (slice(None), slice(None, None, 4))
    torch.testing.assert_close(student[0].weight, teacher[0].weight[first], rtol=0, atol=0)
    torch.testing.assert_close(student[2].weight, 2 * teacher[2].weight[last])
    torch.testing.assert_close(student[1].running_mean, teacher[1].running_mean[::4], rtol=0, atol=0)
    torch.testing.assert_close(student[1].running_var, teacher[1].running_var[::4], rtol=0, atol=0)
    assert student[1].num_batches_tracked == 1


def test_the_scale_of_what_comes_out_stays():
    torch.manual_seed(0)
    x = torch.randn(2000, 3)
    teacher = perceptron(512)
    with torch.no_grad():
        for index in (0, 2, 4):
            teacher[index].weight.normal_(std=(2 / teacher[index].in_features) ** 0.5)
    expected = teacher(x).std().item()
    found = {}
    for rescale in (True, False):
        student = perceptron(64)
        select_weights(student, teacher, rescale=rescale)
        found[rescale] = student(x).std().item() / expected
    assert 0.5 < found[True] < 2
    assert found[False] < 0.25


def test_a_weight_norm_keeps_the_norm_of_the_teachers_rows():
    teacher, student = (nn.Sequential(weight_norm(nn.Linear(width, 4))) for width in (16, 4))
    select_weights(student, teacher)
    torch.testing.assert_close(student[0].weight.norm(dim=1), teacher[0].weight.norm(dim=1))


def test_embeddings_and_pyro_parameters_are_chosen_and_never_rescaled():
    def network(width):
        module = PyroModule[nn.Module]()
        module.codes = nn.Embedding(5, width)
        module.scale = PyroParam(torch.rand(2, width) + 0.1, constraint=dist.constraints.positive)
        return module

    teacher, student = network(8), network(4)
    select_weights(student, teacher)
    torch.testing.assert_close(student.codes.weight, teacher.codes.weight[:, ::2], rtol=0, atol=0)
    torch.testing.assert_close(student.scale, teacher.scale[:, ::2])


def test_buffers_of_other_modules_stay():
    teacher, student = nn.Linear(2, 4), nn.Linear(2, 2)
    teacher.register_buffer("permutation", torch.tensor([3, 1, 0, 2]))
    student.register_buffer("permutation", torch.tensor([1, 0]))
    select_weights(student, teacher)
    assert student.permutation.tolist() == [1, 0]


def test_a_tied_weight_is_given_once():
    def network(width):
        module = nn.ModuleDict({"first": nn.Linear(width, width), "second": nn.Linear(width, width)})
        module["second"].weight = module["first"].weight
        return module

    teacher, student = network(4), network(2)
    assert select_weights(student, teacher) == []
    assert student["second"].weight is student["first"].weight
    torch.testing.assert_close(student["first"].weight, 2**0.5 * teacher["first"].weight[::2, ::2])


def test_the_first_layers_of_a_deeper_teacher_are_taken():
    teacher, student = (
        nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]),
        nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)]),
    )
    assert select_weights(student, teacher) == []
    torch.testing.assert_close(student[2].bias, teacher[2].bias[::2], rtol=0, atol=0)


def test_a_model_of_this_project_starts_from_a_larger_one():
    teacher, student = VRNN(12, 30), VRNN(4, 10)
    before = values_of(teacher)
    assert select_weights(student, teacher) == []
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())


def test_units_of_ones_own():
    """An image of 2 channels of 4 pixels, of which one is kept, is flattened in front of the last layer."""
    teacher, student = nn.Linear(8, 3), nn.Linear(4, 3)

    def units(name, dim, size, wanted):
        assert (name, dim, size, wanted) == ("weight", 1, 8, 4)
        return torch.arange(4, 8)

    select_weights(student, teacher, units=units, rescale=False)
    torch.testing.assert_close(student.weight, teacher.weight[:, 4:], rtol=0, atol=0)


@pytest.mark.parametrize("indices", [[0, 1], [0, 1, 2, 8], [0, 1, 2, -1], [0, 1, 2, 2], [0.0, 1.0, 2.0, 3.0], [True] * 4])
def test_invalid_units_are_refused(indices):
    with pytest.raises(ValueError, match=r"units\('weight', 1, 8, 4\) must return 4 different indices below 8"):
        select_weights(nn.Linear(4, 3), nn.Linear(8, 3), units=lambda *args: torch.tensor(indices))


def changed(change):
    network = perceptron(8)
    change(network)
    return network


def set_nan(network):
    network[4].weight.data[0, 3] = torch.nan


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        (perceptron(3), r"'0.weight': shape \(4, 3\) is not part of \(3, 3\)"),
        (changed(lambda network: network.pop(4)), "'4.weight': there is none of this name"),
        (changed(set_nan), "'4.weight': the teacher's values are not all finite"),
        (nn.Sequential(nn.Conv1d(3, 8, 1)), r"'0.weight': shape \(4, 3\) is not part of \(8, 3, 1\)"),
        (nn.Sequential(nn.LazyLinear(8)), "'0.weight': it has no shape yet"),
    ],
    ids=["smaller", "absent", "not finite", "other dimensions", "lazy"],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(teacher, reason):
    student = perceptron(4)
    before = values_of(student)
    with pytest.raises(WeightSelectionError, match=reason):
        select_weights(student, teacher)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_an_error_in_units_changes_nothing():
    student = perceptron(4)
    before = values_of(student)

    def units(name, dim, size, wanted):
        if name == "4.weight":
            raise KeyError(name)
        return torch.arange(wanted)

    with pytest.raises(KeyError):
        select_weights(student, perceptron(8), units=units)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_what_has_no_counterpart_may_stay():
    teacher, student = changed(lambda network: network.pop(4)), perceptron(4)
    before = values_of(student)
    assert select_weights(student, teacher, strict=False) == ["4.weight", "4.bias"]
    assert torch.equal(student[4].weight, before["4.weight"])
    torch.testing.assert_close(student[0].bias, teacher[0].bias[::2], rtol=0, atol=0)


def test_networks_without_a_common_name_are_refused_even_so():
    with pytest.raises(WeightSelectionError, match="for 2 of 2 parameters"):
        select_weights(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), strict=False)


@pytest.mark.parametrize("offset", [-0.1, 1.0, float("nan")])
def test_an_offset_out_of_range_is_refused(offset):
    with pytest.raises(ValueError, match="offset must be at least 0 and below 1"):
        select_weights(nn.Linear(2, 2), nn.Linear(2, 2), offset=offset)


def test_a_program_in_place_of_its_network_is_refused():
    with pytest.raises(TypeError, match="teacher must be the nn.Module that holds the weights"):
        select_weights(Decoder(2), freeze(Decoder(4)).__call__)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_student_is_nearer_to_its_teacher_after_a_few_steps(seed):
    """A teacher that has learned to be some function, as trained networks are."""
    torch.manual_seed(seed)
    vae = Decoder(64)
    optim = torch.optim.Adam(vae.parameters(), lr=1e-2)
    for _ in range(300):
        z = torch.randn(256, 3)
        target = torch.stack([(2 * z[:, 0]).sin() + z[:, 1], z.prod(1)], 1)
        optim.zero_grad()
        (vae.network(z) - target).square().mean().backward()
        optim.step()
    teacher, losses = freeze(copy.deepcopy(vae)), dict[str, float]()
    for start in ("random", "selected"):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        student = Decoder(16)
        if start == "selected":
            select_weights(student, vae)
        distiller = Distiller(student, teacher, lambda params: torch.optim.Adam(params, lr=1e-2), LocalKD(["y"]))
        distiller.fit(ROWS, steps=100, progress=False)
        losses[start] = distiller.evaluate(1000, num_samples=1).loss.mean
    assert losses["selected"] < 0.8 * losses["random"], losses


def test_several_offsets_compete():
    torch.manual_seed(0)
    vae, offsets, students = Decoder(8), iter([0.0, 0.25, 0.5, 0.75]), []

    def make():
        students.append(Decoder(2))
        select_weights(students[-1], vae, offset=next(offsets))
        return Distiller(students[-1], freeze(vae), lambda params: torch.optim.SGD(params, lr=0.0), LocalKD(["y"]))

    pyro.set_rng_seed(0)
    best = best_start(make, ROWS, starts=4, steps=1)
    losses = []
    for student in students:
        pyro.set_rng_seed(1)
        losses.append(float(LocalKD(["y"]).loss(student, freeze(vae), 1000)))
    assert len(set(losses)) == 4
    chosen = next(iter(best.parameters.values()))
    assert [any(chosen is p for p in student.parameters()) for student in students].index(True) == losses.index(min(losses))
