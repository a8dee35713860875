"""Programs that differ in train and eval mode: freeze keeps the mode if asked to, and a loss warns if modes differ."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_kd
from pyro_kd import LocalKD, freeze
from pyro_kd.errors import UnpairedSiteError
from tests.support.losses import SurrogateKD


class Process(nn.Module):
    """As an exact Gaussian process: its prior in train mode, its posterior in eval mode."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self):
        pyro.sample("y", dist.Normal(0.0, self.scale if self.training else 0.1 * self.scale))


class Smooth(nn.Module):
    """Has a mode, as every module, and does not ask for it."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self):
        pyro.sample("y", dist.Normal(0.0, self.scale))


class Layers(nn.Module):
    """Torch's own layers have modes, and nobody is surprised by theirs."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self):
        with pyro.plate("rows", 8):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.net(z), 1.0).to_event(1))


class HasProcess(nn.Module):
    """Its part asks, by name."""

    def __init__(self):
        super().__init__()
        self.process = Process()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self):
        scale = self.process.scale if getattr(self.process, "training") else self.log_scale.exp()  # noqa: B009
        pyro.sample("y", dist.Normal(0.0, scale))


class MoreSites(nn.Module):
    """Draws a site more in train mode."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(1.0))

    def forward(self):
        loc = pyro.sample("z", dist.Normal(self.loc, 1.0)) if self.training else self.loc
        pyro.sample("y", dist.Normal(loc, 1.0))


def as_function(process):
    def model():
        pyro.sample("y", dist.Normal(0.0, process.scale if process.training else 0.1 * process.scale))

    return model


def value(student, teacher, loss=SurrogateKD):
    return loss(["y"])(student, teacher)().item()


def test_freeze_puts_a_program_in_eval_mode_or_keeps_its_mode():
    assert value(Process().eval(), freeze(Process())) == 0
    assert value(Process(), freeze(Process(), keep_modes=True)) == 0
    assert value(Process().eval(), freeze(Process().eval(), keep_modes=True)) == 0
    assert value(as_function(Process()), freeze(as_function(Process()), keep_modes=True)) == 0
    assert value(Layers(), freeze(Layers(), keep_modes=True)) != 0


@pytest.mark.parametrize("keep_modes", [True, False])
def test_each_module_keeps_its_own_mode(keep_modes):
    layers = Layers()
    layers.net[1].eval()
    frozen = freeze(layers, keep_modes=keep_modes)
    assert [module.training for module in frozen.program.modules()] == [
        keep_modes and module.training for module in layers.modules()
    ]
    assert [module.training for module in layers.modules()] == [True, True, True, False, True]


def test_a_copy_of_a_frozen_program_keeps_its_modes():
    assert copy.deepcopy(freeze(Process(), keep_modes=True)).program.training
    assert not copy.deepcopy(freeze(Process())).program.training


def test_a_teacher_in_train_mode_trains_a_student():
    teacher, student = freeze(Process(3.0), keep_modes=True), Process(1.0)
    loss, optim = SurrogateKD(["y"])(student, teacher), torch.optim.Adam(student.parameters(), lr=0.1)
    for _ in range(150):
        optim.zero_grad()
        loss().backward()
        optim.step()
    assert student.scale.item() == pytest.approx(3.0, abs=0.05)


DIFFERENT = {
    "another program in eval mode": lambda: (Process(), freeze(Process())),
    "a function that asks": lambda: (as_function(Process()), freeze(as_function(Process()))),
    "a part that asks": lambda: (HasProcess(), freeze(HasProcess())),
    "an unfrozen teacher, which runs in eval mode": lambda: (Process(), Process()),
    "a student in eval mode": lambda: (Process().eval(), freeze(Process(), keep_modes=True)),
    "another architecture": lambda: (Process(), freeze(Smooth())),
}
ALIKE = {
    "both in eval mode": lambda: (Process().eval(), freeze(Process())),
    "both in train mode": lambda: (Process(), freeze(Process(), keep_modes=True)),
    "nothing asks for the mode": lambda: (Smooth(), freeze(Smooth())),
    "batch norm": lambda: (Layers(), freeze(Layers())),
    "a student that does not ask": lambda: (Smooth(), freeze(Process())),
    "a teacher without modules": lambda: (Process(), lambda: pyro.sample("y", dist.Normal(0.0, 1.0))),
}


@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
@pytest.mark.parametrize("case", DIFFERENT)
def test_modes_that_differ_and_matter_warn_once(case, loss):
    student, teacher = DIFFERENT[case]()
    own, theirs = ("eval", "train") if "student in eval" in case else ("train", "eval")
    module = loss(["y"])(student, teacher)
    with pytest.warns(
        UserWarning, match=rf"student is in {own} mode and the teacher in {theirs} mode.*site 'y'.*keep_modes=True"
    ):
        module()
    module()


def test_two_students_of_a_loss_are_each_checked_once():
    loss, teacher, students = SurrogateKD(["y"]), freeze(Process()), [Process(), Process()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for student in 3 * students:
            loss.loss(student, teacher)
    assert ["train mode" in str(warning.message) for warning in caught] == [True, True]


def test_a_compiled_loss_warns_of_modes_that_differ():
    module = SurrogateKD(["y"])(Process(), freeze(Process()))
    module.compile(backend=None)
    with pytest.warns(UserWarning, match="student is in train mode"):
        value = module()
    assert module() == value


@pytest.mark.parametrize("case", ALIKE)
def test_modes_that_do_not_matter_do_not_warn(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value(*ALIKE[case]())


def test_the_warning_states_the_losses_in_both_modes():
    with pytest.warns(UserWarning, match=r"its term at site 'y' is 1.808, and in eval mode it would be 0\."):
        assert value(Process(), freeze(Process())) == pytest.approx(1.8076, abs=1e-4)


def test_comparing_the_modes_leaves_draws_buffers_modes_and_gradients_as_they_were():
    class Counted(Layers):
        def forward(self):
            assert isinstance(self.training, bool)
            super().forward()

    def run(student):
        pyro.set_rng_seed(0)
        loss = SurrogateKD(["y"])(student, freeze(Layers()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss().backward()
        grads = [param.grad for param in student.parameters()]
        return torch.rand(()), student.net[1].num_batches_tracked, [m.training for m in student.modules()], len(grads)

    torch.manual_seed(1)
    plain, looked_at = Layers(), Counted()
    assert run(plain) == run(looked_at)


@pytest.mark.parametrize("reuse", [1, 4])
def test_a_large_teacher_runs_once_for_each_thing_that_a_first_step_finds_out(reuse):
    """That is: the latents that can be given, the modes, what its densities depend on, and the loss itself, as in later steps."""
    runs = []

    class Student(Layers):
        def forward(self):
            assert isinstance(self.training, bool)
            super().forward()

    class Teacher(Layers):
        def forward(self):
            runs.append(1)
            super().forward()

    loss = pyro_kd.SurrogateKD(["y"], reuse=reuse)(Student(), freeze(Teacher()))
    loss()
    assert len(runs) == 4
    loss()
    assert len(runs) == 5


def test_noise_of_the_students_own_is_the_same_in_both_modes():
    class Student(Layers):
        def forward(self):
            assert isinstance(self.training, bool)
            pyro.sample("own", dist.Normal(0.0, 1.0))
            super().forward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SurrogateKD(["y"], fresh=["own"])(Student(), freeze(Layers()))()


def test_a_student_whose_sites_depend_on_the_mode_gets_the_error_of_its_own_mode():
    """In eval mode it would pair with the teacher; as it is, the error says what is wrong."""
    with pytest.raises(UnpairedSiteError, match="'z'"):
        SurrogateKD(["y"])(MoreSites(), freeze(MoreSites()))()
