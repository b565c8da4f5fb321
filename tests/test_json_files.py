"""JSON files of this repository: an object of the expected shape, or one line that names file, key and remedy."""

import json

import pytest

from common import UserError
from common.json_files import read_object
from common.runlog import METRICS_FILE, read_metrics

SHAPE = {"step": int, "loss": (float, None), "runs": [{"name": str}], "config": {"lr": float}, "title?": str}
GOOD = {"step": 3, "loss": None, "runs": [{"name": "a"}], "config": {"lr": 1, "more": []}}


@pytest.mark.parametrize("change", [{}, {"loss": 0.5}, {"loss": 2}, {"title": "t"}, {"runs": []}, {"extra": [1]}])
def test_an_object_of_the_shape_comes_back_equal(tmp_path, change):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(GOOD | change))
    assert read_object(path, SHAPE, "make it again") == GOOD | change


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be JSON"),
        (b'{"step": 3', "must be JSON"),
        (b"9" * 5000, "must be JSON"),
        (b"[" * 100_000, "must be JSON"),
        ('{"step": "\u00fc"}'.encode("latin-1"), "UTF-8"),
        *[(each, "must hold an object, got") for each in (b"[]", b"null", b"5", b'"x"', b"true")],
        (b"{}", "hold step as a whole number, got none"),
        ({"step": "3"}, 'step as a whole number, got "3"'),
        ({"step": True}, "step as a whole number, got true"),
        ({"step": 1.5}, "step as a whole number, got 1.5"),
        ({"loss": "x"}, 'loss as a number or null, got "x"'),
        ({"runs": {}}, "runs as an array, got {}"),
        ({"runs": [{"name": "a"}, {}]}, "runs[1].name as text, got none"),
        ({"config": []}, "config as an object, got []"),
        ({"config": {"lr": None}}, "config.lr as a number, got null"),
        ({"title": 3}, "title as text, got 3"),
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(json.dumps(GOOD | content).encode() if isinstance(content, dict) else content)
    with pytest.raises(UserError) as caught:
        read_object(path, SHAPE, "make it again")
    printed = str(caught.value)
    assert message in printed and str(path) in printed and printed.endswith("make it again") and "\n" not in printed


def test_a_missing_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"No such file.*make it again"):
        read_object(tmp_path / "x.json", SHAPE, "make it again")


def test_metrics_match_the_written_lines_without_a_half_written_last_one(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    first, second = read_metrics(tmp_path)
    assert first == {"step": 1, "loss": 2.5} and second["step"] == 2 and second["loss"] != second["loss"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"step": 1}\n{"ste\n{"step": 3}\n', "line 2 must be JSON"),
        (b'{"step": 1}\n[]\n{"step": 3}\n', "line 2 must hold an object"),
        (b'{"loss": 1.0}\n{"step": 3}\n', "line 1 must hold step as a whole number, got none"),
        (b'{"step": 1, "loss": "x"}\n', None),
        ('{"step": 1, "note": "\u00fc"}\n'.encode("utf-16"), "UTF-8"),
    ],
)
def test_damaged_metrics_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / METRICS_FILE).write_bytes(content)
    if message is None:
        assert read_metrics(tmp_path)[0]["step"] == 1
        return
    with pytest.raises(UserError) as caught:
        read_metrics(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
