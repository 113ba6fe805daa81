import pytest
from support.scoring import SCORERS


@pytest.fixture(params=SCORERS.values(), ids=SCORERS)
def score(request):
    """Both ways to token statistics, under the signature of ``token_stats_from_logits``."""
    return request.param
