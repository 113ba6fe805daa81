from __future__ import annotations

import pytest

from tokenpref.data.columns import column_of, value_at
from tokenpref.data.pairs import RowFault

ROW = {
    "info": {"post": "text", "site": None},
    "answers": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}],
    "lists": {"text": ["a", "b"], "rank": [1, 2]},
    "json": '{"post": ["x", {"y": "z"}]}',
    "a.b": "a column with a dot",
    "nothing": None,
    "deep": [[{"x": [1]}], [{"x": [2, 3]}]],
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("info.post", "text"),
        ("info.site", None),
        ("info.absent", None),
        ("answers[].text", ["a", "b"]),
        ("answers[1].rank", 2),
        ("lists[].rank", [1, 2]),
        ("lists[0].text", "a"),
        ("lists.text", ["a", "b"]),
        ("json.post[1].y", "z"),
        ("a.b", "a column with a dot"),
        ("nothing.post", None),
        ("nothing[0]", None),
        ("deep[0][0].x", [1]),
        ("deep[][].x[0]", [[1], [2]]),
    ],
)
def test_paths(path, value):
    assert column_of(path, ROW) == (path if path in ROW else path.replace("[", ".").split(".")[0])
    assert value_at(ROW, path) == value


@pytest.mark.parametrize(
    "path", ["other", "info.", "info..post", "answers[", "answers[x]", "answers[-1]", "", ".", "[0]"]
)
def test_what_is_no_path(path):
    assert column_of(path, ROW) is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("answers[2].text", "has 2 elements, so none at place 2"),
        ("info[0]", "holds a dict, where a list is needed"),
        ("answers.text", "leads into a list, where a struct is needed"),
        ("info.post.more", "text that is not JSON"),
        ("answers[].text.more", "text that is not JSON"),
        ("answers[0].rank.more", "leads into a int"),
    ],
)
def test_places_that_a_row_lacks_are_faults_of_the_row(path, message):
    with pytest.raises(RowFault, match=message) as fault:
        value_at(ROW, path)
    assert fault.value.column == path
