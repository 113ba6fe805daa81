"""What a run's folder says about itself is read with care: it decides what is kept and what is replaced."""

import pytest

from tokenpref.distributed import single_process_world
from tokenpref.errors import ConfigError
from tokenpref.training.saving.run_folder import RunFolder


@pytest.fixture
def finished(tmp_path):
    folder = RunFolder(tmp_path / "mine", {"epochs": 1}, "recipe", single_process_world())
    folder.claim(resume=False)
    folder.finish("epoch_0")
    yield folder
    folder.unlock()


def test_a_finished_run_names_its_weights(finished):
    assert finished.finished() == finished.path / "epoch_0"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"weights"', "Expecting"),
        ("[]", "list indices"),
        ("{}", "'weights'"),
        ('{"weights": 3}', "weights is 3"),
        ('{"weights": "../elsewhere"}', "weights is '../elsewhere'"),
        ('{"weights": "/elsewhere"}', "weights is '/elsewhere'"),
        ('{"weights": ".."}', "weights is '..'"),
    ],
)
def test_a_damaged_end_is_refused(finished, text, fault):
    (finished.path / "finished.json").write_text(text)
    with pytest.raises(ConfigError, match=f"finished.json is damaged .*{fault}.*remove it and run again"):
        finished.finished()
