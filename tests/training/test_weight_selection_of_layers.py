"""Layers whose units cannot be chosen, or whose weights are no sums over inputs."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from pyro_kd.errors import WeightSelectionError
from pyro_kd.training import select_weights


def test_what_is_no_sum_over_inputs_is_never_rescaled():
    """A norm over two dimensions, and a table of positions that a module of one's own holds."""

    def network(width):
        module = nn.ModuleDict({"norm": nn.LayerNorm((5, width))})
        module.register_parameter("positions", nn.Parameter(torch.randn(7, width)))
        return module

    teacher, student = network(8), network(4)
    select_weights(student, teacher)
    assert torch.equal(student["norm"].weight, torch.ones(5, 4))
    torch.testing.assert_close(student.positions, teacher.positions[:, ::2], rtol=0, atol=0)


def test_a_bilinear_layer_is_rescaled_for_both_inputs():
    teacher, student = nn.Bilinear(8, 8, 3), nn.Bilinear(2, 4, 3)
    select_weights(student, teacher)
    torch.testing.assert_close(student.weight, 8**0.5 * teacher.weight[:, ::4, ::2])


@pytest.mark.parametrize("parametrise", [orthogonal, spectral_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrisations_with_values_elsewhere_are_refused(parametrise):
    teacher, student = (nn.Sequential(parametrise(nn.Linear(width, width))) for width in (8, 4))
    with pytest.raises(WeightSelectionError, match="of its parametrisation no units can be chosen"):
        select_weights(student, teacher)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_former_weight_norm_keeps_its_norm():
    teacher, student = (nn.Sequential(torch.nn.utils.weight_norm(nn.ConvTranspose1d(width, 4, 1))) for width in (8, 4))
    select_weights(student, teacher)
    torch.testing.assert_close(student[0].weight_g, teacher[0].weight_g[::2], rtol=0, atol=0)


def test_a_batch_norm_that_the_teacher_has_twice():
    teacher = nn.ModuleDict({"first": nn.BatchNorm1d(4)})
    teacher["second"] = teacher["first"]
    teacher["first"](torch.randn(8, 4) + 3)
    student = nn.ModuleDict({"first": nn.BatchNorm1d(2), "second": nn.BatchNorm1d(2)})
    select_weights(student, teacher)
    assert torch.equal(student["second"].running_mean, teacher["first"].running_mean[::2])


@pytest.mark.parametrize(
    ("student", "teacher", "reason"),
    [
        (nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 5), "the kernels have different sizes"),
        (nn.Linear(2, 2, device="meta"), nn.Linear(2, 2), "a tensor on the meta device has no values"),
        (nn.Linear(2, 2), nn.Linear(2, 2, device="meta"), "a tensor on the meta device has no values"),
        (nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64), "the teacher's is complex"),
        (nn.ReLU(), nn.ReLU(), "the student's network has no parameters"),
    ],
    ids=["kernel", "meta student", "meta teacher", "complex", "none"],
)
def test_what_has_no_values_to_choose_is_refused(student, teacher, reason):
    with pytest.raises(WeightSelectionError, match=reason):
        select_weights(student, teacher)


def test_values_that_the_students_type_cannot_hold_are_refused():
    teacher = nn.Linear(2, 2)
    nn.init.constant_(teacher.weight, 1e6)
    with pytest.raises(WeightSelectionError, match=r"not all finite in torch.float16"):
        select_weights(nn.Linear(2, 2, dtype=torch.float16), teacher)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_units_are_no_error():
    assert select_weights(nn.Linear(0, 4), nn.Linear(3, 8)) == []


@pytest.mark.parametrize("returned", [None, [[1], [2, 3]]])
def test_units_that_are_no_indices_are_refused(returned):
    with pytest.raises(ValueError, match=r"units\('weight', 1, 8, 4\) must return indices"):
        select_weights(nn.Linear(4, 3), nn.Linear(8, 3), units=lambda *args: returned)
