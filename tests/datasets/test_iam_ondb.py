"""IAM-OnDB's XML gives the movements between the points that were written, and no entity is expanded."""

import pytest
import torch

from pyro_kd.datasets import iam_ondb, iam_ondb_forms
from pyro_kd.errors import CorruptDataError, MissingDataError
from tests.support.data_files import line


@pytest.fixture
def root(tmp_path):
    for form, number, strokes in [
        ("a01-000u", 1, [[(1073, 1058), (1072, 1085), (1066, 1117)], [(1215, 1073), (1213, 1100)]]),
        ("a01-000u", 2, [[(5, 6)], [], [(7, 9)]]),
        ("b02-110", 1, [[(0, 0), (1, 0), (1, 1)]]),
    ]:
        folder = tmp_path / "lineStrokes" / form[:3] / form[:7]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{form}-{number:02d}.xml").write_text(line(*strokes), encoding="latin1")
    return tmp_path


def first(root):
    return root / "lineStrokes" / "a01" / "a01-000" / "a01-000u-01.xml"


def test_movements_are_those_between_the_points(root):
    for folder in (root, root / "lineStrokes"):
        strokes = iam_ondb(folder)
        assert strokes.lengths.tolist() == [5, 2, 3]
        assert strokes[0].tolist() == [[0, 0, 0], [-1, 27, 0], [-6, 32, 1], [149, -44, 0], [-2, 27, 1]]
        assert strokes[1].tolist() == [[0, 0, 1], [2, 3, 1]]
        assert strokes[2].tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 1]]
        assert strokes.points.dtype == torch.float32


def test_forms_and_limit_select_lines(root):
    assert iam_ondb_forms(root) == ["a01-000u", "b02-110"]
    assert iam_ondb(root, forms=["b02-110"]).lengths.tolist() == [3]
    assert iam_ondb(root, limit=2).lengths.tolist() == [5, 2]
    with pytest.raises(MissingDataError, match="'z99-000' is missing"):
        iam_ondb(root, forms=["z99-000", "b02-110"])
    with pytest.raises(ValueError, match="limit must be at least 1"):
        iam_ondb(root, limit=0)


def test_missing_files_say_what_to_fetch(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(MissingDataError, match=r"fki.tic.heia-fr.ch(.|\n)*ROOT/lineStrokes/a01/a01-000/a01-000u-01.xml"):
            iam_ondb(path)


def bomb():
    entities = '<!ENTITY e0 "ha">' + "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    return line([(0, 0)]).replace(
        "<WhiteboardCaptureSession>", f"<!DOCTYPE x [{entities}]>\n<WhiteboardCaptureSession>&e11;", 1
    )


@pytest.mark.parametrize("encoding", ["latin1", "utf-16"])
@pytest.mark.parametrize(
    "text",
    [
        bomb(),
        line([(0, 0)]).replace("<White", "<!DOCTYPE x>\n<White", 1),
        line([(0, 0)]).replace("<White", '<!DOCTYPE x SYSTEM "file:///etc/hostname">\n<White', 1),
    ],
    ids=["bomb", "doctype", "external"],
)
def test_entities_are_refused(root, text, encoding):
    first(root).write_text(text.replace("ISO-8859-1", "UTF-16" if encoding == "utf-16" else "ISO-8859-1"), encoding=encoding)
    with pytest.raises(CorruptDataError, match=r"a01-000u-01.xml: it declares a document type"):
        iam_ondb(root)


def test_the_error_names_a_truncated_file(root):
    whole = first(root).read_bytes()
    for length in range(0, len(whole) - 2, 17):
        first(root).write_bytes(whole[:length])
        with pytest.raises(CorruptDataError, match=r"a01-000u-01.xml"):
            iam_ondb(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(), "it has no Point"),
        (line([]), "it has no Point"),
        ("<svg/>", "it has no Point"),
        (line([("a", 0)]), "could not convert"),
        (line([("nan", 0), (1, 1)]), "NaN"),
        (line([("1e400", 0), (1, 1)]), "NaN"),
        (line([(0, 0)]).replace(' x="0"', ""), "'x'"),
        ('<StrokeSet><Point x="1" y="1"/></StrokeSet>', "outside"),
    ],
)
def test_files_with_different_contents_are_refused(root, text, message):
    first(root).write_text(text, encoding="latin1")
    with pytest.raises(CorruptDataError, match=rf"a01-000u-01.xml.*{message}"):
        iam_ondb(root)
