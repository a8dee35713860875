"""Errors and docs/troubleshooting.md: each class has its place on the page, and each message names it."""

import copy
import errno
import pickle
import re

import pytest

from pyro_kd import errors
from pyro_kd.errors import CheckpointError, MissingDataError, NoTargetsError, PyroKDError, UnpairedSiteError
from tests.support.package_files import ROOT

CLASSES = {name: getattr(errors, name) for name in errors.__all__}
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
BY_NAME = PAGE.split("## Errors by name\n")[1]


def test_each_error_has_a_place_on_the_page_and_each_place_an_error():
    assert re.findall(r"^### (.+)$", BY_NAME, re.M) == sorted(CLASSES)


def test_each_place_says_more_than_the_name():
    for place in BY_NAME.split("\n### ")[1:]:
        name, _, text = place.partition("\n")
        assert len(text.split()) >= 15, name


def test_all_errors_of_the_module_are_public():
    found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert found == set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_a_message_ends_with_its_place(name):
    error = CLASSES[name]("site 'z' is wrong.")
    assert str(error) == f"site 'z' is wrong. See docs/troubleshooting.md#{name.lower()}."
    assert (ROOT / error.page.partition("#")[0]).exists()
    assert error.message == "site 'z' is wrong."


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_survives_pickling_and_copying(name):
    error = CLASSES[name]("site 'z' is wrong.")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert (str(other), other.args) == (str(error), error.args)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("", "See {}."),
        ("it is wrong", "it is wrong. See {}."),
        ("is it wrong?", "is it wrong? See {}."),
        ("2 errors:\n1. one\n2. two.", "2 errors:\n1. one\n2. two.\nSee {}."),
    ],
)
def test_the_place_is_a_sentence_of_its_own(message, shown):
    assert str(NoTargetsError(message)) == shown.format("docs/troubleshooting.md#notargetserror")
    assert str(NoTargetsError()) == "See docs/troubleshooting.md#notargetserror."


def test_an_error_inside_a_message_stands_without_its_place():
    inner = UnpairedSiteError("site 'z' has no partner.")
    outer = NoTargetsError(f"step 3: {inner} Nothing was trained.")
    assert str(outer) == "step 3: site 'z' has no partner. Nothing was trained. See docs/troubleshooting.md#notargetserror."
    assert f"{inner:>30}" == f"{'site ' + repr('z') + ' has no partner.':>30}"


def test_a_users_subclass_is_explained_where_its_base_is():
    class MineError(UnpairedSiteError):
        pass

    assert MineError("no.").page == "docs/troubleshooting.md#unpairedsiteerror"
    assert str(MineError("no.")).endswith("#unpairedsiteerror.")


@pytest.mark.parametrize("kind", [CheckpointError, MissingDataError])
def test_errors_of_files_keep_what_the_system_says(kind):
    error = kind(errno.ENOENT, "there is no such file", "a.pt")
    assert (error.errno, error.filename) == (errno.ENOENT, "a.pt")
    assert error.message == "[Errno 2] there is no such file: 'a.pt'"
    assert str(error) == f"{error.message}. See {error.page}."


def test_the_traceback_shows_the_place():
    with pytest.raises(PyroKDError, match=r"no targets\. See docs/troubleshooting\.md#notargetserror\.$"):
        raise NoTargetsError("no targets.")
