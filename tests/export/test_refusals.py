"""What cannot be exported is refused, with the site and the reason; a wrong result is never returned."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd.errors import UnsupportedExportError
from pyro_kd.export import export_sampler


def rows(num_rows):
    return pyro.plate("rows", num_rows)


def test_a_branch_on_a_drawn_value_is_refused_with_its_line():
    def model(num_rows):
        with rows(num_rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            shift = 1.0 if z.mean() > 0 else -1.0
            pyro.sample("y", dist.Normal(shift, 1.0).expand([num_rows]))

    with pytest.raises(
        UnsupportedExportError,
        match=r"the program, after site 'z' at .*test_refusals.py:\d+, shift = 1.0 if .* cannot be a graph: what it does depends on the "
        r"values of tensors .*torch.where",
    ):
        export_sampler(model, 4, targets=["y"])


def test_a_rejection_loop_is_refused_with_its_site():
    def model(num_rows):
        with rows(num_rows):
            pyro.sample(
                "positive", dist.Rejector(dist.Normal(torch.zeros(num_rows), 1.0), _is_positive, -torch.ones(num_rows))
            )

    with pytest.raises(UnsupportedExportError, match="site 'positive' draws .* times in one run|sampler of site 'positive'"):
        export_sampler(model, 8, targets=["positive"])


def _is_positive(x):
    return torch.where(x > 0, 0.0, -torch.inf)


def test_a_loop_over_rows_is_refused():
    def model(num_rows):
        for i in pyro.plate("rows", num_rows):
            pyro.sample(f"y{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(
        UnsupportedExportError, match="the sites of the program depend on the number of rows.*'y4'.*fixed=True"
    ):
        export_sampler(model, 4, targets=["y0"])
    with pytest.raises(UnsupportedExportError, match="none of the example's.*Use pyro.plate as a context, not as a loop"):
        export_sampler(model, 3, targets=["y0"], fixed=True)


def test_a_number_of_rows_that_means_something_else_too_is_refused():
    def model(num_rows, length):
        with rows(num_rows):
            for t in range(length):
                pyro.sample(f"y{t}", dist.Normal(0.0, 1.0))

    with pytest.raises(
        UnsupportedExportError, match="Choose example arguments in which nothing but the number of rows has this number"
    ):
        export_sampler(model, 4, 4, targets=["y0"])
    assert export_sampler(model, 4, 2, targets=["y0"]).description.noise[0].shape == ("rows",)


def test_one_row_is_refused():
    def model(num_rows):
        with rows(num_rows):
            pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedExportError, match="a graph keeps a size of 0 or 1 for ever. Call with 2 rows or more"):
        export_sampler(model, 1, targets=["y"], rows="rows")


def test_plates_are_named_where_several_could_be_meant():
    def model(x):
        with pyro.plate("words", x.shape[1], dim=-1), pyro.plate("documents", x.shape[0], dim=-2):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)

    x = torch.zeros(4, 3)
    with pytest.raises(
        UnsupportedExportError, match="several plates are among the arguments: 'words', 'documents'.*rows='words'"
    ):
        export_sampler(model, x)
    with pytest.raises(UnsupportedExportError, match="rows='document' is not a plate .* Did you mean 'documents'"):
        export_sampler(model, x, rows="document")
    assert export_sampler(model, x, rows="documents").description.noise[0].shape == ("rows", 3)


def test_a_plain_number_made_of_the_rows_is_refused():
    def model(x):
        with rows(int(x.shape[0])):
            pyro.sample("y", dist.Normal(x.sum(-1), 1.0))

    with pytest.raises(UnsupportedExportError, match="turns the number of rows into a plain number"):
        export_sampler(model, torch.zeros(4, 3), targets=["y"])


def test_len_of_an_argument_stays_open():
    def model(x):
        with rows(len(x)):
            pyro.sample("y", dist.Normal(x.sum(-1), 1.0))

    exported = export_sampler(model, torch.zeros(4, 3), targets=["y"])
    assert exported({"y/normal": torch.zeros(7), "x": torch.ones(7, 3)})["y"].tolist() == [3.0] * 7


def test_a_program_that_changes_from_run_to_run_is_found():
    calls = []

    def model(num_rows):
        calls.append(None)
        with rows(num_rows):
            pyro.sample("y", dist.Normal(float(len(calls)), 1.0))

    with pytest.raises(UnsupportedExportError, match="site 'y' another value when it runs again on the same noise"):
        export_sampler(model, 4, targets=["y"])


def test_wrong_inputs_are_refused():
    def model(num_rows):
        with rows(num_rows):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0))

    exported = export_sampler(model, 4, targets=["y"])
    good = {"z/normal": torch.zeros(5), "y/normal": torch.zeros(5)}
    with pytest.raises(UnsupportedExportError, match="missing are 'z/normal', and foreign 'z'"):
        exported({"y/normal": good["y/normal"], "z": torch.zeros(5)})
    with pytest.raises(UnsupportedExportError, match="different numbers of rows"):
        exported({**good, "z/normal": torch.zeros(4)})
    with pytest.raises(UnsupportedExportError, match=r"input 'z/normal' has shape \(5, 1\)"):
        exported({**good, "z/normal": torch.zeros(5, 1)})
    with pytest.raises(UnsupportedExportError, match="torch.float64, and should have .* torch.float32"):
        exported({**good, "z/normal": torch.zeros(5).double()})
    with pytest.raises(UnsupportedExportError, match="say how many, sample"):
        exported.sample()
    with pytest.raises(UnsupportedExportError, match=r"has no suffix .pt2 or .onnx"):
        exported.save("student.pt")


def test_a_program_that_serves_one_number_of_rows_is_refused():
    known = torch.ones(4)

    def model(num_rows):
        with rows(num_rows):
            pyro.sample("y", dist.Normal(known, 1.0))

    with pytest.raises(
        UnsupportedExportError,
        match=r"the program fails with 7 rows in place of 4 \(\w+: .*\)\. Choose example .*fixed=True",
    ):
        export_sampler(model, 4, targets=["y"])
    assert not export_sampler(model, 4, targets=["y"], fixed=True).description.has_rows
