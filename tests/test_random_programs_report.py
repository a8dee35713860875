"""The page on random programs: it counts the programs of a complete run, and is not written for a part of one."""

from collections import Counter

import pytest

from tests.random_programs_report import HEAD, PAGE, counts, page
from tests.support.program_laws.table import LAWS, SINCE_LAST_RUN


def report(path, laws):
    cases = [
        f'<testcase name="test_law_on_new_random_programs[{law}-{shard}]"><properties><property name="programs" value="{350 + shard}"/>'
        "</properties></testcase>"
        for law in laws
        for shard in range(2)
    ]
    path.write_text(f'<testsuites><testsuite><testcase name="other"/>{"".join(cases)}</testsuite></testsuites>')
    return path


def test_programs_are_added_up_over_the_parts_of_a_run(tmp_path):
    found = counts(report(tmp_path / "slow.xml", LAWS))
    assert found == Counter(dict.fromkeys(LAWS, 701))
    assert f"In the last complete run {701 * len(LAWS):,} programs passed" in page(found)


def test_a_part_of_a_run_makes_no_page(tmp_path):
    with pytest.raises(SystemExit, match="not complete: no program of replay"):
        page(counts(report(tmp_path / "slow.xml", list(LAWS)[1:])))


def test_the_page_is_from_a_complete_run_of_these_laws():
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert text.startswith(HEAD)
    assert rows == ["law", *[name for name in LAWS if name not in SINCE_LAST_RUN]]
