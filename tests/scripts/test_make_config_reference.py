"""docs/configs.md is what the script makes of the code, and it names everything that a config may."""

import importlib.util
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tokenpref._registry import config_files
from tokenpref.training.config.defaults import component_paths

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "make_config_reference", ROOT / "scripts/make_config_reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(script):
    return script.reference()


def test_the_page_is_up_to_date(page):
    assert (ROOT / "docs/configs.md").read_text() == page, "run `make docs`"


def test_every_key_and_every_component_of_the_shipped_configs_is_listed(page):
    keys, listed = (
        set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)),
        set(re.findall(r"^#### `(\S+)`", page, re.MULTILINE)),
    )
    for name, file in config_files().items():
        config = OmegaConf.to_container(OmegaConf.load(file))
        assert set(config) <= keys, name
        assert {path for _, path in component_paths(config) if path.startswith("tokenpref.")} <= listed, name


def test_a_key_has_its_kind_default_and_meaning(page):
    assert "| `keep_last` | a whole number of at least 1 | `1` | Resumable checkpoints to keep. |" in page
    assert "| `output_dir` | text | *required* | The run writes everything to this folder. |" in page
    assert (
        "| `alpha` | a number or null | `null` | Factor of the KL terms, >= 0, for tdpo2 only. Null means 0.5. |"
        in page
    )


def test_a_key_without_a_meaning_is_refused(script, tmp_path, monkeypatch):
    (tmp_path / "silent_keys.py").write_text(
        "class Keys:\n    spoken: int = 1\n    '''Said.'''\n    silent: int = 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import silent_keys

    with pytest.raises(ValueError, match="Keys.silent: has no text that says what it means"):
        script._field_texts(silent_keys.Keys)
