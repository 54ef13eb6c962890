"""Frozen weights under autocast: converted once, renewed when they change, unknown to whatever copies a model."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from avadclip_fast.models.frozen import lowered
from avadclip_fast.models.text import TextEncoder

TOKENS = [[49406, 5, 49407], [49406, 7, 8, 49407]]
autocast = torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 3), requires_grad=False)


def test_is_converted_once(weight):
    with autocast:
        one, two = lowered(weight), lowered(weight)
        assert one is two and torch.equal(one, weight.bfloat16())
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(lowered(weight), weight.half())
    with autocast:
        assert lowered(weight) is one


@pytest.mark.parametrize("learned", [False, True])
def test_is_itself_without_autocast_or_if_it_learns(weight, learned):
    weight.requires_grad_(learned)
    with torch.autocast("cpu", torch.bfloat16, enabled=learned):
        assert lowered(weight) is weight


def test_a_change_in_place_is_seen_where_it_was_read(weight):
    """In place, because a CUDA graph reads from there."""
    with autocast:
        one = lowered(weight)
        with torch.no_grad():
            weight.mul_(2)
        assert lowered(weight) is one and torch.equal(one, weight.bfloat16())


def test_another_tensor_behind_it_is_seen(weight):
    with autocast:
        lowered(weight)
        weight.data = torch.randn(5, 3)  # what Module.to does
        assert torch.equal(lowered(weight), weight.bfloat16())


def test_another_tensor_at_the_same_address_is_seen(weight):
    """As after `model.half().float()`, or wherever an allocator hands out again what was just freed."""
    memory = np.zeros((4, 3), np.float32)
    with autocast:
        for value in (1.0, 2.0):
            memory[:] = value
            weight.data = torch.from_numpy(memory)
            assert (lowered(weight) == value).all()


def test_what_inference_mode_makes_can_be_trained_through(weight):
    x = torch.randn(2, 3, requires_grad=True)
    with autocast:
        with torch.inference_mode():
            lowered(weight)
        (x @ lowered(weight).T).sum().backward()
    assert x.grad is not None
    with torch.inference_mode(), autocast:
        born = nn.Parameter(torch.randn(4, 3), requires_grad=False)
        assert lowered(born) is born  # torch would not count its changes


@pytest.fixture
def encoder() -> TextEncoder:
    encoder = TextEncoder(TOKENS, 16, 64, 2)
    encoder.randomize()
    return encoder


def features(encoder: TextEncoder) -> torch.Tensor:
    with autocast:
        return encoder()


def test_the_encoder_converts_every_weight_of_its_products_once(encoder):
    """Of the kernels of a second call, none converts a weight."""
    features(encoder)
    sizes = {p.numel() for p in encoder.parameters() if p.ndim == 2}
    with torch.profiler.profile(record_shapes=True) as profile:
        features(encoder)
    copied = [e.input_shapes[0] for e in profile.events() if e.name == "aten::copy_"]
    assert not [shape for shape in copied if len(shape) == 2 and shape[0] * shape[1] in sizes]


@pytest.mark.parametrize("change", ["load_state_dict", "randomize", "assign", "double and back", "edit"])
def test_the_encoder_notices_every_change_of_its_weights(encoder, change):
    other = TextEncoder(TOKENS, 16, 64, 2)
    other.randomize(7)
    other.prompt.load_state_dict(encoder.prompt.state_dict())
    before, expected = features(encoder), features(other)
    assert not torch.equal(before, expected)
    if change == "randomize":
        encoder.randomize(7)
    elif change == "edit":
        with torch.no_grad():
            for mine, its in zip(encoder.parameters(), other.parameters(), strict=True):
                mine.copy_(its)
    elif change == "double and back":
        encoder.double().load_state_dict(other.state_dict())
        encoder.float()
    else:
        encoder.load_state_dict(other.state_dict(), assign=change == "assign")
    assert torch.equal(features(encoder), expected)


@pytest.mark.parametrize("change", ["half and back", "load_state_dict"])
@torch.no_grad()  # a graph refers to the weights as well
def test_the_encoder_lets_torch_swap_its_weights(encoder, change):
    """torch refuses to swap what is weakly referred to."""
    other = TextEncoder(TOKENS, 16, 64, 2)
    other.randomize(7)
    other.prompt.load_state_dict(encoder.prompt.state_dict())
    before, expected = features(encoder), features(other)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        if change == "half and back":
            assert not torch.equal(features(encoder.half().float().bfloat16()), before)
            encoder.float()
        encoder.load_state_dict(other.state_dict())
        assert torch.equal(features(encoder), expected)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_copies_and_files_know_nothing_of_it(encoder):
    names = set(encoder.state_dict())
    expected, file = features(encoder), io.BytesIO()
    assert set(encoder.state_dict()) == names
    twin = copy.deepcopy(encoder)
    assert torch.equal(features(twin), expected)
    twin.randomize(7)
    assert torch.equal(features(encoder), expected)
    torch.save(encoder, file)
    stored, plain = file.tell(), sum(x.numel() * x.element_size() for x in encoder.state_dict().values())
    assert stored < plain + 2**16
    file.seek(0)
    assert torch.equal(features(torch.load(file, weights_only=False)), expected)


def test_gradients_of_the_prompt_are_those_of_converting_every_time(encoder):
    def gradient() -> torch.Tensor:
        (grad,) = torch.autograd.grad(features(encoder).float().square().sum(), encoder.prompt.weight)
        return grad

    kept = gradient()
    for p in encoder.parameters():
        p.requires_grad_()  # as they learn, nothing is kept
    assert torch.equal(gradient(), kept)
