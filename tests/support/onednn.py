"""Which builds of PyTorch can multiply by oneDNN."""

import pytest
import torch

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch is built without oneDNN (macOS)"
)
