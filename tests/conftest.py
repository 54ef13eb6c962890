from pathlib import Path

import pytest
import torch
from standins import pair  # noqa: F401  a fixture

# What a GPU's float32 is held to: cuDNN's convolutions are tf32 by default.
torch.backends.cudnn.allow_tf32 = False
# The reference must give the same bits twice: some of cuDNN's gradients are added up in any order.
torch.backends.cudnn.deterministic = True


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and the authors' numbers, which live beside the checkout, not in it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is absent: the tests against real data did not run")
    return folder
