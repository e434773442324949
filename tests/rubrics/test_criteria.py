"""Rubric files: what is wrong with one is said in one line."""

from __future__ import annotations

import pytest

from k2rl.errors import ConfigError
from rubrics.criteria import load

GOOD = """
name: mine
version: 2
provenance: human
criteria:
  - {name: clarity, text: Is it clear, choices: [poor, good]}
  - {name: depth, text: Is it deep, choices: {flat: 0, deep: 2, deeper: 5}, weight: 2, mandatory: true}
"""


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    found = load(str(path))
    assert found.identity == "mine@2"
    assert [found.criteria[1].value(label) for label in found.criteria[1].labels] == [0, 0.4, 1]
    assert found.criteria[0].value("good") == 1


@pytest.mark.parametrize("name", ["core", "prescriptive"])
def test_what_is_shipped_is_sound(name):
    found = load(name)
    assert found.name == found.provenance == name
    assert any(criterion.mandatory for criterion in found.criteria)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed("weight: 2", "wieght: 2"), "unknown field `wieght`"),
        (changed("version: 2", "version: 2\nauthor: me"), "unknown field `author`"),
        (changed("name: depth", "name: Clarity "), "'clarity' is there twice"),
        (changed("weight: 2", "weight: -1"), "weight=-1.0 must be 0 or more"),
        (changed("weight: 2", "weight: .nan"), "weight=nan"),
        (
            changed("weight: 2", "weight: 0").replace("choices: [poor, good]", "choices: [a, b], weight: 0"),
            "sum to 0",
        ),
        (changed("flat: 0, deep: 2", "flat: 3, deep: 2"), "choices out of order"),
        (changed("flat: 0, deep: 2", "flat: 2, deep: 2"), "choices out of order"),
        (changed("[poor, good]", "[good, Good]"), "two different choices"),
        (changed("[poor, good]", "[good]"), "two different choices"),
        (changed("provenance: human", "provenance: divine"), "Invalid enum value 'divine'"),
        (changed("version: 2", "version: 2\nversion: 3"), "'version' twice"),
        (changed("text: Is it clear,", "text: ' ',"), "no name or no text"),
        ("name: [", "is no YAML"),
        ("- a", "Expected `object`"),
        ("name: x\nversion: 1\nprovenance: core\ncriteria: []", "sum to 0"),
        ("!!python/object/apply:os.system ['true']", "is no YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cor", "/nowhere.yaml", "/tmp", "a\0b"])
def test_a_file_that_is_not_there(name):
    with pytest.raises(ConfigError, match="none of core, correctness, prescriptive and no readable file"):
        load(name)
