import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from standins import pair  # noqa: F401  a fixture

from avadclip_fast.ops._triton import INTERPRETED

# What a GPU's float32 is held to: cuDNN's convolutions are tf32 by default.
torch.backends.cudnn.allow_tf32 = False
# The reference must give the same bits twice: some of cuDNN's gradients are added up in any order.
torch.backends.cudnn.deterministic = True

if INTERPRETED:  # half of the interpreter's time goes to two things that change nothing
    import triton.language as tl
    from triton.runtime import interpreter

    # It works out whether whole numbers overflow, and throws that away.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # At every call of a device function it puts itself in the place of triton.language, as the kernel's call has done.
    patch = interpreter._patch_lang

    def patch_once(fn):
        own = (x for x in fn.__globals__.values() if x is tl or x is tl.core)
        plain = any(tl.core.is_builtin(x.load) for x in own)
        return patch(fn) if plain else SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and the authors' numbers, which live beside the checkout, not in it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is absent: the tests against real data did not run")
    return folder
