import pytest

from tokenpref.components import accepts, find_component, nearest, signature_faults


def test_finds_functions_classes_and_methods_by_path():
    import fractions

    assert find_component("fractions.Fraction") is fractions.Fraction


def test_a_module_of_the_current_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "some_users_own_module.py").write_text("def thing(a): return a\n")
    monkeypatch.chdir(tmp_path)
    assert find_component("some_users_own_module.thing")(3) == 3


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("torch.optim.AdamWW", "did you mean 'AdamW'?"),
        ("no_such_package.Thing", "no_such_package"),
        ("", "Empty"),
        ("math.pi", "is a float, not something to call"),
    ],
)
def test_unknown_paths_say_what_failed(path, words):
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        find_component(path)


def takes(a, b, *, c=1):
    return a, b, c


def test_signature_faults_name_unknown_and_missing_arguments():
    assert signature_faults(takes, {"b": 1}, (), positional=1) == []
    assert signature_faults(takes, {}, ("b",), positional=1) == []
    (unknown,) = signature_faults(takes, {"b": 1, "cc": 2}, (), positional=1)
    assert unknown.startswith("cc: takes takes no such argument")
    assert signature_faults(takes, {}, (), positional=1) == [
        "b: takes needs this argument and the config does not set it"
    ]


def test_open_ended_components_accept_anything():
    assert accepts(lambda **kwargs: None, "whatever")
    assert accepts(takes, "c") and not accepts(takes, "d")


def test_nearest_is_silent_when_nothing_is_near():
    assert nearest("zzz", ["alpha", "beta"]) == ""
