"""Compressing a recurrent model of drawings: the smoke preset, what it must learn, and its measures by hand."""

import json
import math

import pytest
import torch

from examples import vrnn
from examples._drawings import Drawings, distances, features
from examples.vrnn import VRNNSettings
from models.vrnn import VRNN
from pyro_kd.datasets import Standardisation

SMALL = VRNNSettings(length=3, steps=50, batch=64, latents=2, learning_rate=3e-2)


def drawings_of(moves, pens, lengths, length):
    points = torch.zeros(len(lengths), length, 3)
    points[..., :2], points[..., 2] = torch.tensor(moves), torch.tensor(pens)
    mask = torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
    return Drawings(points, mask, Standardisation(torch.zeros(2), torch.ones(2)))


def test_the_smoke_preset_runs_and_reuses_its_teacher(tmp_path, capsys):
    argv = ["--preset", "smoke", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    results = vrnn.main(argv)
    assert "trained before" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "out" / "strokes-0.png").read_bytes().startswith(b"\x89PNG")
    models = results["runs"][0]["models"]
    assert list(models) == ["data", "teacher", "scratch", "local, weight 1", "surrogate (ours), weight 0.001"]
    assert models["teacher"]["parameters"] > models["scratch"]["parameters"]
    for name in ("scratch", "local, weight 1", "surrogate (ours), weight 0.001"):
        figures = models[name]
        assert all(math.isfinite(figure) for figure in figures.values())
        assert figures["bound"] == min(figures["surrogate"], figures["local"]) > 0
        assert models["teacher"]["step/teacher"] < figures["step/teacher"]

    argv[argv.index("--out") + 1] = str(tmp_path / "again")
    again = vrnn.main(
        [*argv, "--steps", "2", "--students", "scratch", "selected-0.001", "fitted-0.001", "--guide-steps", "0"]
    )
    assert math.isfinite(again["runs"][0]["models"]["from the teacher's weights (ours), weight 0.001"]["bound"])
    assert "trained before" in capsys.readouterr().out
    for figure in ("elbo", "step/data", "step/teacher"):  # the same teacher
        assert again["runs"][0]["models"]["teacher"][figure] == pytest.approx(models["teacher"][figure], rel=1e-5)


@pytest.mark.parametrize("name", ["local-1", "local-w2-0.1", "surrogate-0.001", "surrogate-1"])
def test_a_student_that_is_its_teacher_has_no_loss(name):
    teacher = VRNN(6, 7, 2)
    assert vrnn.student_named(name, SMALL.length)[1].loss(teacher.model, vrnn.freeze(teacher.model), 5, 3) == 0.0


@pytest.mark.parametrize("name", ["local-1", "local-w2-0.1", "surrogate-0.001", "surrogate-1"])
def test_distillation_reduces_the_bound(name):
    teacher, student = VRNN(6, 7, 2), VRNN(4, 5, 2)
    with torch.no_grad():
        teacher.generative["decoder"][-1].bias.copy_(torch.tensor([2.0, 1.0, -1.0]))
    before = [parameter.clone() for parameter in teacher.parameters()]
    model = vrnn.freeze(teacher.model)

    def bounds():
        losses = (
            vrnn.paper_loss(vrnn.targets(SMALL.length), latent_weight=0.0),
            vrnn.student_named("local-1", SMALL.length)[1],
        )
        return [vrnn.bound(loss, student, model, SMALL) for loss in losses]

    first = bounds()
    vrnn.compress(student, model, vrnn.student_named(name, SMALL.length)[1], SMALL.steps, SMALL, "test")
    assert all(after < 0.5 * start for after, start in zip(bounds(), first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before, strict=True))


def test_a_fitted_guide_leaves_the_model_alone():
    model, data = VRNN(6, 7, 2), drawings_of([1.0, -1.0], 0.0, [3] * 64, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = vrnn.fitted_guide(model, data, 0, VRNNSettings(length=3, batch=64, guide_steps=5), "test")
    for name, value in fitted.state_dict().items():
        assert torch.equal(model.state_dict()[name], before[name])
        assert torch.equal(value, before[name]) == name.startswith("generative")


def test_measures_by_hand():
    """Two steps to the right, one up with the pen lifted before it; and a drawing of one point, padded."""
    moves = [[[3.0, 0.0], [3.0, 4.0], [0.0, 2.0]], [[1.0, 0.0], [9.0, 9.0], [9.0, 9.0]]]
    drawings = drawings_of(moves, [[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]], [3, 1], 3)
    found = features(drawings)
    assert found["pen"].tolist() == [0, 1, 0, 0]
    assert found["step"].tolist() == [3, 5, 2, 1]
    assert found["stroke"].tolist() == [2, 1, 1]
    assert found["angle"].tolist() == pytest.approx([math.atan2(4, 3), math.atan2(3, 4)])
    assert found["drawing"].tolist()[0] == [3, 0, 0, 6, 4, 1, 6, 6, 0]
    assert found["drawing"].tolist()[1] == [1, 0, 0, *[0] * 6]


def test_drawings_do_not_differ_from_themselves():
    x = features(drawings_of(torch.randn(20, 3, 2).tolist(), 0.0, [3] * 20, 3))
    found = distances(x, x)
    assert all(found[name] == 0 for name in ("pen", "step", "stroke", "angle"))


@pytest.mark.parametrize("name", ["theirs-1", "surrogate-w3-1", "local", "surrogate-x"])
def test_an_unknown_student_is_refused(name):
    with pytest.raises(ValueError, match="is unknown. The students are"):
        vrnn.student_named(name, SMALL.length)


def test_the_labels_of_students():
    names = ("scratch", "local-1", "surrogate-w2-0.1", "selected-1", "fitted-1")
    labels = [vrnn.student_named(name, SMALL.length)[0] for name in names]
    assert labels == [
        "scratch",
        "local, weight 1",
        "surrogate (ours), mean W2², weight 0.1",
        "from the teacher's weights (ours), weight 1",
        "from fitted layers (ours), weight 1",
    ]
