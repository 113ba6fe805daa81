import numpy as np
from support import workers

from tokenpref.distributed import single_process_world
from tokenpref.distributed.testing import run_distributed


def test_state_written_by_two_ranks_continues_in_one_process(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    written = run_distributed(workers.save_and_load, str(folder), False)[0]
    read = workers.save_and_load(single_process_world(), str(folder), True)
    assert written.keys() == read.keys()
    for name in written:
        np.testing.assert_allclose(read[name], written[name], rtol=0, atol=1e-14, err_msg=name)
