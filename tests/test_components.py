from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import pytest

from tokenpref.components import accepts, argument_faults, find_component, nearest, signature_faults


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


class Plain:
    pass


def annotated(
    flag: bool = False,
    count: int = 1,
    rate: float = 1.0,
    maybe: int | None = None,
    words: Sequence[str] = (),
    pair: tuple[float, float] = (0.0, 0.0),
    table: Mapping[str, int] | None = None,
    kind: Literal["a", "b"] = "a",
    place: str | Path = ".",
    maker: Plain | None = None,
    call: Callable[[int], int] | None = None,
    anything: Any = None,
    loose=True,
    optional: int = None,  # as others write it
):
    return None


annotated.__module__ = "tokenpref.made_up"

REFUSED = {
    "flag": ["false", 1, 0, None, [], "x"],
    "count": [True, 1.5, "1", None, 10**30, [1], {}],
    "rate": ["1e-3", True, None, [1.0], 10**30],
    "maybe": ["1", 1.5, False],
    "words": ["word", [1], {"a": "b"}, None],
    "pair": [[], [1.0], [1.0, 2.0, 3.0], ["a", "b"], 1.0],
    "table": [[1], {"a": "b"}, {"a": True}, "x"],
    "kind": ["c", 1, None],
    "place": [1, None, ["a"], {}],
    "maker": ["x", 1, {"a": 1}],
    "call": ["x", 1],
    "loose": ["true", 1],
    "optional": ["1", 1.5],
}
ACCEPTED = {
    "flag": [True, False],
    "count": [0, -5, 2**62],
    "rate": [1, 1.5, -0.0],
    "maybe": [None, 3],
    "words": [[], ["a"]],
    "pair": [[1, 2.0]],
    "table": [None, {}, {"a": 1}],
    "kind": ["b"],
    "place": ["x"],
    "maker": [None, Plain(), {"_component_": "x"}],
    "call": [None, len],
    "anything": [1, "x", [], {}],
    "loose": [False],
    "optional": [None, 2],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in REFUSED.items() for v in values])
def test_a_value_that_its_annotation_refuses_is_a_fault(name, value):
    (fault,) = argument_faults(annotated, {name: value})
    assert fault.startswith(f"{name} must be ") and ", got " in fault


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ACCEPTED.items() for v in values])
def test_a_value_that_its_annotation_takes_is_none(name, value):
    assert argument_faults(annotated, {name: value}) == []


def test_the_fault_says_what_to_set():
    (fault,) = argument_faults(annotated, {"flag": "False"})
    assert fault == 'flag must be true or false, got "False"; set flag=false without quotation marks'
    (fault,) = argument_faults(annotated, {"words": "good"})
    assert fault == 'words must be a list (text each), got "good"; set words=[good]'


def of_others(flag: bool = False, rate: float = 1.0, words: list[str] = ()):
    return None


def test_components_of_others_are_refused_only_what_is_never_meant():
    assert argument_faults(of_others, {"rate": 10**30, "words": "a b c", "unknown": 1}) == []
    assert len(argument_faults(of_others, {"flag": "no", "rate": "fast"})) == 2


def test_optimizers_of_torch_are_held_to_their_annotations():
    from torch.optim import AdamW

    faults = argument_faults(AdamW, {"betas": [], "amsgrad": "x", "fused": "yes", "lr": 0.1, "eps": 1})
    assert faults == [
        "betas must be a list of 2 values (a number, a number), got []",
        'amsgrad must be true or false, got "x"',
        'fused must be true, false or null, got "yes"',
    ]


def test_every_annotation_of_ours_can_be_read():
    """Otherwise an argument would go unchecked."""
    import tokenpref.data
    import tokenpref.losses
    import tokenpref.models
    import tokenpref.rewards
    import tokenpref.training
    import tokenpref.weights.attribution
    import tokenpref.weights.transforms

    modules = (tokenpref.losses, tokenpref.data, tokenpref.models, tokenpref.rewards, tokenpref.training)
    modules += (tokenpref.weights.attribution, tokenpref.weights.transforms)
    components = [getattr(module, name) for module in modules for name in module.__all__]
    found = 0
    for component in components:
        is_class = isinstance(component, type)
        if is_class and (issubclass(component, Exception) or getattr(component, "_is_protocol", False)):
            continue
        if not is_class and not isinstance(component, FunctionType):
            continue
        names = inspect.signature(component).parameters if not hasattr(component, "_fields") else {}
        for name, parameter in names.items():
            assert parameter.annotation is not inspect.Parameter.empty or parameter.kind in (
                inspect.Parameter.VAR_KEYWORD,
                inspect.Parameter.VAR_POSITIONAL,
            ), f"{component.__name__}.{name}"
            if parameter.annotation in ("bool", bool):
                assert argument_faults(component, {name: "x"}), f"{component.__name__}.{name}"
                found += 1
    assert found > 10
