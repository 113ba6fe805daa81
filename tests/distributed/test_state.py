import io
import os
import pickle

import numpy as np
import pytest
import torch
from support import small, workers
from torch.distributed.checkpoint import metadata

from tokenpref.distributed import safe_reading, single_process_world
from tokenpref.distributed.safe_reading import _IndexUnpickler
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import TokenprefError


def test_state_written_by_two_ranks_continues_in_one_process(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    written = run_distributed(workers.save_and_load, str(folder), False)[0]
    read = workers.save_and_load(single_process_world(), str(folder), True)
    assert written.keys() == read.keys()
    for name in written:
        np.testing.assert_allclose(read[name], written[name], rtol=0, atol=1e-14, err_msg=name)


def test_whole_tensors_are_looked_up_one_at_a_time_and_split_among_the_ranks():
    alone = workers.filled_on_demand(single_process_world())
    expected = small.decoder(2).state_dict()
    main, other = run_distributed(workers.filled_on_demand)
    for found in (alone, main):
        assert found["most"] == 1
        assert found["held"].keys() == {*expected, "layers.0.odd", "counts"}
        for name, tensor in expected.items():
            np.testing.assert_array_equal(found["held"][name], tensor, err_msg=name)
        np.testing.assert_array_equal(found["held"]["layers.0.odd"], np.arange(6.0).reshape(3, 2))
        np.testing.assert_array_equal(found["held"]["counts"], [3, 4])
        missing, unexpected, shape, unreadable = found["refusals"]
        assert "no 'norm.scale'" in missing
        assert "unexpected 'more'" in unexpected
        assert "'norm.scale' has shape [3]" in shape
        assert unreadable == "OSError: layers.0.odd cannot be read"
    # The other rank neither waits nor goes on.
    assert all(refusal.startswith("TokenprefError: rank 0 failed: ") for refusal in other["refusals"])


def test_a_file_that_ends_too_early_is_not_read_as_zeros(tmp_path, monkeypatch):
    folder = tmp_path / "state"
    folder.mkdir()
    world = single_process_world()
    workers.save_and_load(world, str(folder), False)
    # As if it were cut between the look at the index and the reading.
    monkeypatch.setattr(safe_reading, "_check_index", lambda index, folder: None)
    (file,) = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(TokenprefError, match="ends after"):
        workers.save_and_load(world, str(folder), True)


class Attribute:
    """Pickled as the attribute ``name`` of ``of``, as some versions of Python pickle a member of an enumeration."""

    def __init__(self, of, name):
        self.of, self.name = of, name

    def __reduce__(self):
        return (getattr, (self.of, self.name))


def test_the_index_reader_knows_members_of_its_enumerations_and_no_other_attribute():
    def read(value):
        return _IndexUnpickler(io.BytesIO(pickle.dumps(value))).load()

    formats = metadata._MEM_FORMAT_ENCODING
    assert read(Attribute(formats, "TORCH_CHANNELS_LAST")) is formats.TORCH_CHANNELS_LAST
    assert read(formats.TORCH_CHANNELS_LAST) is formats.TORCH_CHANNELS_LAST
    for of, name in ((torch.Size, "__init__"), (metadata.Metadata, "__doc__")):
        with pytest.raises(pickle.UnpicklingError, match="which is not allowed"):
            read(Attribute(of, name))
    with pytest.raises(pickle.UnpicklingError, match=r"refers to posix.system|refers to os.system"):
        read(os.system)
