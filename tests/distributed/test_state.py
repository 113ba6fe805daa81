import io
import os
import pickle

import numpy as np
import pytest
import torch
from support import workers
from torch.distributed.checkpoint import metadata

from tokenpref.distributed import single_process_world
from tokenpref.distributed.safe_reading import _IndexUnpickler
from tokenpref.distributed.testing import run_distributed


def test_state_written_by_two_ranks_continues_in_one_process(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    written = run_distributed(workers.save_and_load, str(folder), False)[0]
    read = workers.save_and_load(single_process_world(), str(folder), True)
    assert written.keys() == read.keys()
    for name in written:
        np.testing.assert_allclose(read[name], written[name], rtol=0, atol=1e-14, err_msg=name)


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
        with pytest.raises(pickle.UnpicklingError, match="it is not read"):
            read(Attribute(of, name))
    with pytest.raises(pickle.UnpicklingError, match=r"asks for posix.system|asks for os.system"):
        read(os.system)
