"""The whole models: the authors' numbers, the plain model operation by operation, padding, the text side."""

import ast
import importlib.util
import inspect
import itertools
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import plain_model
import pytest
import torch
from op_tests import ON_GPU
from small_models import CLASSES, SIZES, TOKENS, batch, draw, student, teacher
from torch import Tensor

from avadclip_fast import AVadCLIP, AVadCLIPStudent, objective, use_backend
from avadclip_fast.data import DataError
from avadclip_fast.engine.recipe import Recipe
from avadclip_fast.models import avadclip, groups
from avadclip_fast.models.checkpoints import official_state
from avadclip_fast.models.text import TextEncoder, tokenize
from avadclip_fast.ops import _autocast
from avadclip_fast.ops._linear_act_cpu import HAS_AVX512, spares
from avadclip_fast.ops._triton import INTERPRETED


def relative(got: Tensor, expected) -> float:
    expected = torch.as_tensor(np.asarray(expected)).double()
    return ((got.detach().double().reshape(expected.shape) - expected).norm() / expected.norm()).item()


# The authors' numbers


@pytest.fixture(scope="module")
def interpreted_fast():
    """Tiles of products 32 times as large in Triton's interpreter, which takes as long for small ones."""
    large = {"rows": 128, "cols": 128, "depth": 128, "warps": 8, "stages": 1, "tma": False, "persistent": False}
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr("avadclip_fast.kernels.linear_act.default_config", lambda *_: large)
        yield


@pytest.fixture(scope="module")
def golden(shared, interpreted_fast):
    """Outputs, losses and gradients of both models on the authors' weights and batch, and what the authors got."""
    path = shared / "parity" / "golden_small.npz"
    if not path.exists():
        pytest.skip("../shared/parity/golden_small.npz is absent: nothing was compared with the authors' code")
    spec = importlib.util.spec_from_file_location("recipe", shared / "parity" / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    numbers = np.load(path)
    seed, classes = int(numbers["seed"]), [str(name) for name in numbers["prompts"]]
    visual, audio, _ = recipe.batch(numbers["lengths"].tolist(), int(numbers["length"]), seed)
    labels, lengths = torch.from_numpy(numbers["labels"]), torch.from_numpy(numbers["lengths"])

    def load(cls, kind: str, seed: int):
        names = (str(key).split(" ", 1) for key in numbers[f"{kind}/keys"])
        state = {name: recipe.value(name, ast.literal_eval(shape), seed) for name, shape in names}
        return cls.from_official(state, classes, window=int(numbers[f"window_{kind}"]))

    def backward(model, out, **distilled) -> SimpleNamespace:
        losses = objective(model, out, labels, lengths, **distilled)
        losses["total"].backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return SimpleNamespace(out=out, losses=losses, grads=official_state(grads))

    model = load(AVadCLIP, "teacher", seed)
    first = backward(model, model(visual, audio, lengths))
    model = load(AVadCLIPStudent, "student", seed + 1)
    second = backward(model, model(visual, lengths), teacher_features=first.out.features.detach(), distill_weight=1e-2)
    return SimpleNamespace(numbers=numbers, teacher=first, student=second)


AUTHORS = 1e-4  # float32 in another order of summation, over some thirty layers


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_outputs_are_the_authors(golden, kind):
    out = getattr(golden, kind).out
    ours = {
        "features": out.features,
        "text": out.text_features,
        "logits1": out.anomaly_logits,
        "logits2": out.class_logits,
    }
    if kind == "student":
        ours["theta"] = out.log_variance
    for name, x in ours.items():
        assert relative(x, golden.numbers[f"{kind}/{name}"]) < AUTHORS, name


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_losses_are_the_authors(golden, kind):
    losses = getattr(golden, kind).losses
    assert ("distill" in losses) == (kind == "student")
    for name, x in losses.items():
        official = "loss" if name == "total" else f"loss_{name}"
        assert relative(x, golden.numbers[f"{kind}/{official}"]) < AUTHORS, name


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_gradients_are_the_authors(golden, kind):
    grads, compared = getattr(golden, kind).grads, 0
    for key in golden.numbers.files:
        for what in ("grad", "gradnorm"):
            if key.startswith(f"{kind}/{what}/"):
                grad = grads[key.removeprefix(f"{kind}/{what}/")]
                assert relative(grad if what == "grad" else grad.norm(), golden.numbers[key]) < AUTHORS, key
                compared += 1
    assert compared > 50


# The plain model


def plain(model, visual: Tensor, audio: Tensor, labels: Tensor, lengths: Tensor, heads: int = 1, teach: Tensor = None):
    """The plain model's outputs, cut to valid rows where padding is masked, its total loss, and the state it ran on."""
    state = {k: v.detach().clone() for k, v in official_state(model.state_dict()).items()}
    trained = official_state({k: p for k, p in model.named_parameters() if p.requires_grad})
    s = {k: v.requires_grad_(k in trained and ".net." not in k) for k, v in state.items()}
    window = model.temporal.resblocks[0].attn.window
    text = plain_model.text(s, model.text.tokens, heads)
    videos, mil, align, distill = [], [], [], []
    for b, n in enumerate(lengths.tolist()):
        rows = n if model.padding == "masked" else visual.shape[1]
        v, theta = plain_model.temporal(s, visual[b, :rows], n, window), None
        if isinstance(model, AVadCLIP):
            v = plain_model.fuse(s, v, plain_model.audio_net(s, audio[b, :rows]))
        else:
            v, theta = plain_model.uncertain(s, v)
            distill.append(plain_model.distill_terms(teach[b, :rows], v, theta))
        logits1, logits2 = plain_model.heads(s, v, text, model.prompt.prompt)
        videos.append((v, logits1, logits2, theta))
        losses = plain_model.video_losses(s, logits1, logits2, labels[b], n)
        mil.append(losses[0])
        align.append(losses[1])
    total = sum(mil) / len(mil) + sum(align) / len(align) + 1e-4 * plain_model.text_loss(text)
    if distill:
        total = total + 0.1 * torch.cat(distill).mean()
    return text, videos, total, s


@pytest.mark.parametrize(("padding", "prompt"), [("official", "official"), ("masked", "paper")])
@pytest.mark.parametrize(
    ("make", "window", "lengths", "rows"),
    [
        (teacher, 4, [19, 7, 1], 19),  # the last window has three rows
        (teacher, 24, [3, 16], 18),  # a window longer than the video
        (student, 5, [17, 4], 18),
        (student, 8, [1, 2, 16], 16),
    ],
    ids=["teacher-4", "teacher-24", "student-5", "student-8"],
)
def test_equals_the_plain_model(make, window, lengths, rows, padding, prompt):
    """Outputs, loss and every gradient in float64. What remains is another order of summation."""
    seed = window + rows
    model = make(seed, window=window, padding=padding, prompt=prompt).double()
    visual, audio, labels, n = batch(lengths, rows, seed=seed, dtype=torch.float64)
    teach = torch.randn(visual.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if make is teacher:
        out = model(visual, audio, n)
        losses = objective(model, out, labels, n)
    else:
        out = model(visual, n)
        losses = objective(model, out, labels, n, teach, distill_weight=0.1)
    text, videos, total, state = plain(model, visual, audio, labels, n, teach=teach)
    torch.testing.assert_close(out.text_features, text, rtol=1e-10, atol=1e-10)
    for b, expected in enumerate(videos):
        for got, x in zip(
            (out.features, out.anomaly_logits, out.class_logits, out.log_variance), expected, strict=True
        ):
            assert (got is None) == (x is None)
            if x is not None:
                torch.testing.assert_close(got[b, : len(x)], x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(losses["total"], total, rtol=1e-10, atol=1e-10)

    losses["total"].backward()
    total.backward()
    grads = official_state({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    assert {k for k, v in state.items() if v.requires_grad} == {k for k in grads if ".net." not in k}
    for name, grad in grads.items():
        if ".net." not in name:
            torch.testing.assert_close(grad, state[name].grad, rtol=1e-8, atol=1e-10, msg=lambda m, k=name: f"{k}: {m}")


# Padding


def run(make, model, visual, audio, labels, lengths) -> tuple:
    """(out, gradient of the objective by parameter)."""
    model.zero_grad()
    out = model(visual, audio, lengths) if make is teacher else model(visual, lengths)
    teach = None if make is teacher else torch.linspace(-1, 1, visual.shape[2]).expand_as(visual)
    objective(model, out, labels, lengths, teach, distill_weight=0.1)["total"].backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To float32's rounding: other shapes may sum in another order."""
    for name, x in expected.items():
        scale = max(1.0, x.abs().max().item())
        torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("make", [teacher, student])
def test_masked_padding_has_no_effect(make):
    """Padded longer, and with garbage in place of zeros: the same outputs and the same gradients."""
    model = make(padding="masked")
    visual, audio, labels, lengths = batch([9, 16, 1], 16)
    out, grads = run(make, model, visual, audio, labels, lengths)
    longer = torch.full((2, 3, 23, 32), 50.0)
    longer[:, :, :16] = torch.stack([visual, audio])
    for b, n in enumerate(lengths):
        longer[:, b, n:] = 50.0
    other, other_grads = run(make, model, *longer, labels, lengths)
    for b, n in enumerate(lengths):
        for x, y in ((out.features, other.features), (out.class_logits, other.class_logits)):
            torch.testing.assert_close(x[b, :n], y[b, :n], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.anomaly_logits[b, :n], other.anomaly_logits[b, :n], rtol=1e-4, atol=1e-4)
    assert_same(other_grads, grads)


@pytest.mark.parametrize("make", [teacher, student])
def test_masked_videos_do_not_see_each_other(make):
    """A video alone gives what it gives in a batch; and the mean of the losses' gradients is the batch's gradient."""
    model = make(padding="masked")
    lengths = [12, 12] if make is student else [9, 16, 1]  # the distillation loss is a mean over rows, not videos
    visual, audio, labels, n = batch(lengths, 16)
    out, grads = run(make, model, visual, audio, labels, n)
    mean: dict[str, Tensor] = {}
    for b in range(len(lengths)):
        one = slice(b, b + 1)
        rows = lengths[b]
        alone, alone_grads = run(make, model, visual[one, :rows], audio[one, :rows], labels[one], n[one])
        torch.testing.assert_close(alone.features[0], out.features[b, :rows], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.class_logits[0], out.class_logits[b, :rows], rtol=1e-4, atol=1e-4)
        for name, grad in alone_grads.items():
            mean[name] = mean.get(name, 0) + grad / len(lengths)
    assert_same(mean, grads)


def test_inputs_that_do_not_fit_are_told_by_their_names():
    visual, audio, labels, _ = batch([9, 16], 16)
    for given, wrong in (
        ((visual.numpy(), audio), "visual must be a tensor; got ndarray"),
        ((None, audio), "visual must be a tensor; got NoneType"),
        ((visual, audio[..., 1:]), "audio must have shape [B, T, 32]; got [2, 16, 31]"),
        ((visual[0], audio[0]), "visual must have shape [B, T, 32]; got [16, 32]"),
        ((visual[:, :0], audio[:, :0]), "T=0 does not lie in 1..24"),
        ((visual, audio[:1]), "audio must have B=2 videos of T=16; got [1, 16, 32]"),
        ((visual, audio.to("meta"), torch.tensor([9, 16])), "audio is on meta, but visual is on cpu"),
        ((visual, audio, None, CLASSES), "text_features must have shape [3, 32], as encode_text gives; got list"),
    ):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            teacher()(*given)
    model = teacher()
    with pytest.raises(ValueError, match="the teacher or student itself, such as ddp.module; got DataParallel"):
        objective(torch.nn.DataParallel(model), model(visual, audio), labels)


@pytest.mark.parametrize("make", [teacher, student])
def test_official_padding_leaks(make):
    """The authors' code lets padded rows reach valid ones: the two settings must differ where there is padding."""
    visual, audio, _, lengths = batch([9, 16], 16)
    streams = (visual, audio) if make is teacher else (visual,)
    official, masked = (make(padding=padding)(*streams, lengths) for padding in ("official", "masked"))
    assert (official.features[0, :9] - masked.features[0, :9]).abs().max() > 1e-3
    torch.testing.assert_close(official.features[1], masked.features[1])  # no padding, no difference


@pytest.mark.parametrize("make", [teacher, student])
@pytest.mark.parametrize("rows", [16, 24, 13])
def test_official_is_masked_where_nothing_is_padded(make, rows):
    visual, audio, labels, lengths = batch([rows, rows], rows)
    results = [run(make, make(padding=p), visual, audio, labels, lengths) for p in ("official", "masked")]
    for x, y in zip(results[0][0], results[1][0], strict=True):
        if x is not None:
            torch.testing.assert_close(x, y)
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("make", [teacher, student])
def test_videos_in_groups_of_like_length_give_the_same(make, monkeypatch):
    """Results, of valid rows, and gradients; whatever lies past the lengths."""
    visual, audio, labels, lengths = batch([3, 16, 5, 16, 4, 1, 9], 16)
    past = (torch.arange(16) >= lengths[:, None])[..., None]
    visual, audio = (torch.where(past, 7.0, x) for x in (visual, audio))
    model = make()
    assert len(groups.split(lengths.tolist())) == 1  # so few rows are one group
    whole, gradients = run(make, model, visual, audio, labels, lengths)
    monkeypatch.setattr(groups, "WORTH", 5)
    assert len(groups.split(lengths.tolist())) == 3
    apart, found = run(make, model, visual, audio, labels, lengths)
    assert_same(found, gradients)
    for got, expected in zip(apart, whole, strict=True):
        if got is not None and got.shape[:2] == (7, 16):
            mask = past if got.ndim == 3 else past[..., 0]
            torch.testing.assert_close(got.masked_fill(mask, 0), expected.masked_fill(mask, 0), rtol=1e-5, atol=1e-5)
        elif got is not None:
            torch.testing.assert_close(got, expected)
    for x in (apart.features, apart.log_variance):  # which batch-mates it had, no video is to tell
        assert x is None or (x[past[..., 0]] == 0).all()
    monkeypatch.setattr(model, "padding", "official")  # there padding has a part in the result
    monkeypatch.setattr(groups, "by_length", None)
    run(make, model, visual, audio, labels, lengths)


@pytest.mark.skipif(not HAS_AVX512, reason="needs a processor with AVX-512")
@pytest.mark.parametrize("make", [teacher, student])
@pytest.mark.parametrize("padding", ["official", "masked"])
def test_products_that_leave_rows_out_give_the_same(make, padding):
    """In videos of a length and width from which on they do; whatever lies past the lengths, where it is masked."""
    visual, audio, labels, lengths = batch([200, 31, 256, 97], 256, width=256)
    if padding == "masked":
        past = (torch.arange(256) >= lengths[:, None])[..., None]
        visual, audio = (torch.where(past, 7.0, x) for x in (visual, audio))
    model = make(padding=padding, width=256, length=256)
    assert spares(visual)
    some, found = run(make, model, visual, audio, labels, lengths)
    with use_backend("reference"):
        every, gradients = run(make, model, visual, audio, labels, lengths)
    valid = torch.arange(256) < lengths[:, None]
    for got, expected in zip(some, every, strict=True):
        if expected is not None and padding == "masked" and expected.shape[:2] == (4, 256):
            got, expected = got[valid], expected[valid]
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    for name, x in gradients.items():
        assert (found[name] - x).norm() <= 1e-3 * max(x.norm().item(), 1e-3), name


@pytest.mark.parametrize("make", [teacher, student])
@pytest.mark.parametrize("lengths", [[3, 16, 5, 8], [16, 16], [2], [9, 9, 1]])
def test_windows_of_padding_are_computed_once(make, lengths, monkeypatch):
    """In official padding they are alike in every video; results and gradients are those of computing each."""
    visual, audio, labels, lengths = batch(lengths, 16)
    visual[0, 0] = 0  # a window of which a part is zeros is not padding
    model = make(padding="official")
    rows = []
    model.temporal.resblocks[0].register_forward_pre_hook(lambda block, args: rows.append(args[0].shape[:2].numel()))
    once, found = run(make, model, visual, audio, labels, lengths)
    monkeypatch.setattr(groups, "pays", lambda x: False)
    each, gradients = run(make, model, visual, audio, labels, lengths)
    for got, expected in zip(once, each, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected)
    assert_same(found, gradients)
    w = model.temporal.window
    seen = [-(-n // w) * w for n in lengths.tolist()]
    assert rows == [sum(seen) + 16 - min(seen), 16 * len(lengths)]


def test_windows_of_padding_are_computed_each_if_they_are_not_zeros_or_need_gradients():
    """The authors' code reads whatever lies past the lengths; so does a gradient of the input."""
    visual, audio, labels, lengths = batch([3, 8], 16)
    model = teacher(padding="official")
    expected = model(visual, audio, lengths).features
    visual.requires_grad_()
    out = model(visual, audio, lengths).features
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert (visual.grad != 0).any(2).all()
    visual = visual.detach()
    visual[0, 15] = 5.0
    found = model(visual, audio, lengths).features
    assert (found[0, 12:] - expected[0, 12:]).abs().max() > 0.1
    torch.testing.assert_close(found[0, 12:], model(visual[:1], audio[:1], lengths[:1]).features[0, 12:])


@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [1, 100], [100, 1], [1, 2, 3, 4, 256, 256], [30, 90, 31, 95, 250]])
@pytest.mark.parametrize("worth", [1, 20, 10**6])
def test_groups_cost_the_least(lengths, worth, monkeypatch):
    monkeypatch.setattr(groups, "WORTH", worth)
    found = groups.split(lengths)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))

    def cost(parts) -> int:
        return sum(len(part) * max(part) + worth for part in parts)

    ordered = sorted(lengths)
    ways = [
        [ordered[a:b] for a, b in itertools.pairwise([0, *cuts, len(ordered)])]
        for k in range(len(ordered))
        for cuts in itertools.combinations(range(1, len(ordered)), k)
    ]
    assert cost([[lengths[i] for i in group] for group in found]) == min(map(cost, ways))


@pytest.mark.parametrize("bad", [[3, 0], [3, 17], [3], [[3], [2]]])
def test_lengths_that_do_not_fit_are_refused_with_many_groups_too(bad, monkeypatch):
    monkeypatch.setattr(groups, "WORTH", 0)
    visual, audio, *_ = batch([3, 16], 16)
    with pytest.raises(ValueError, match="lengths"):
        teacher()(visual, audio, torch.tensor(bad))
    for model in (teacher(), teacher(standardize=["audio"])):
        with pytest.raises(ValueError, match=r"audio must have B=2 videos of T=16; got \[1, 16, 32\]"):
            model(visual, audio[:1], torch.tensor([3, 16]))


@pytest.mark.parametrize("make", [teacher, student])
def test_no_lengths_means_that_all_rows_are_valid(make):
    visual, audio, _, lengths = batch([16, 16], 16)
    streams = (visual, audio) if make is teacher else (visual,)
    model = make()
    out, labels = model(*streams), torch.eye(len(CLASSES))[:2]
    assert torch.equal(out.class_logits, model(*streams, lengths).class_logits)
    assert objective(model, out, labels) == objective(model, out, labels, lengths)


# Settings


@pytest.mark.parametrize("count", [2, 5, 20])
def test_any_number_of_classes(count):
    tokens = [[49406, 100 + c, 49407] for c in range(count)]
    model = teacher(classes=[f"class {c}" for c in range(count)], class_tokens=tokens)
    visual, audio, labels, lengths = batch([9, 16, 5], 16, classes=count)
    out, grads = run(teacher, model, visual, audio, labels, lengths)
    assert out.class_logits.shape == (3, 16, count) and out.text_features.shape == (count, 32)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_the_text_loss_of_two_classes_is_one_cosine():
    tokens = [[49406, 5, 49407], [49406, 6, 49407]]
    model = teacher(classes=["normal", "fight"], class_tokens=tokens)
    visual, audio, labels, lengths = batch([9], 16, classes=2)
    out = model(visual, audio, lengths)
    expected = torch.cosine_similarity(*out.text_features, dim=0).abs()
    torch.testing.assert_close(objective(model, out, labels, lengths)["text"], expected)


def test_the_text_loss_is_the_mean_of_absolute_cosines():
    """Of cosines of both signs, which must not make up for each other."""
    text = torch.tensor([[1.0, 0], [3, 0], [-1, 1]])
    torch.testing.assert_close(avadclip.text_loss(text), torch.tensor((1 + 0.5**0.5) / 2))
    assert torch.autograd.gradcheck(avadclip.text_loss, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


def test_the_objective_weighs_as_the_recipe_does():
    defaults = {name: p.default for name, p in inspect.signature(objective).parameters.items()}
    assert (defaults["distill_weight"], defaults["text_weight"]) == (Recipe().distill_weight, Recipe().text_weight)


def test_text_features_at_hand_are_used():
    model = student()
    visual, _, _, lengths = batch([9, 16], 16)
    text = model.encode_text()
    assert torch.equal(model(visual, lengths, text).class_logits, model(visual, lengths).class_logits)
    assert not torch.equal(model(visual, lengths, -text).class_logits, model(visual, lengths).class_logits)


def test_text_features_of_a_subclass_are_those_of_training_too():
    """Evaluation asked its `encode_text`, and `forward` the text encoder."""

    class Own(AVadCLIPStudent):
        def encode_text(self):
            return torch.eye(3, self.width)

    visual, _, _, lengths = batch([9, 16], 16)
    out = Own(CLASSES, class_tokens=TOKENS, window=8, **SIZES)(visual, lengths)
    assert torch.equal(out.text_features, torch.eye(3, 32))


def test_a_model_is_where_its_weights_are_whatever_the_default_device():
    model = teacher(standardize=["visual"])
    visual, audio, labels, lengths = batch([9, 16], 16)
    with torch.device("meta"):  # one that no other device can copy from or compute with
        model.text.randomize()
        model.load_state_dict(model.state_dict())
        model.fit_inputs([SimpleNamespace(lengths=lengths, visual=visual, audio=audio)])
        losses = objective(model, model(visual, audio, lengths), labels)
    assert losses["total"].isfinite()


def test_silence_is_audio_of_zeros():
    model = teacher()
    visual, audio, _, lengths = batch([9, 16], 16)
    silent = model(visual, None, lengths)
    assert torch.equal(silent.features, model(visual, torch.zeros_like(audio), lengths).features)


def test_silence_is_what_standardised_features_call_silence():
    """No audio means zeros after standardisation, as in padded rows; the statistics are those of the valid rows."""
    model = teacher(standardize=["audio"]).eval()
    visual, audio, _, lengths = batch([16, 9], 16)
    audio = 3 + 2 * audio
    audio[1, 9:] = 0
    model.fit_inputs([SimpleNamespace(lengths=lengths, visual=visual, audio=audio)])
    valid = torch.cat([audio[0], audio[1, :9]]).double()
    torch.testing.assert_close(model.standardize["audio"].mean.double(), valid.mean(0))
    torch.testing.assert_close(model.standardize["audio"].std.double(), valid.std(0, correction=0))
    seen = model(visual, audio, lengths).features
    audio[1, 9:] = torch.nan
    torch.testing.assert_close(model(visual, audio, lengths).features, seen, rtol=0, atol=0)
    silent = model(visual, None, lengths).features
    mean = model.standardize["audio"].mean.expand_as(audio)
    torch.testing.assert_close(model(visual, mean, lengths).features, silent)
    assert not torch.allclose(model(visual, torch.zeros_like(audio), lengths).features, silent)


@pytest.mark.parametrize("make", [teacher, student])
def test_gradients_do_not_know_what_padding_holds(make):
    model, grads = make(), []
    visual, audio, labels, lengths = batch([16, 9], 16)
    for padding in (0.0, 1e30, torch.nan):
        visual[1, 9:] = audio[1, 9:] = padding
        model.zero_grad()
        torch.manual_seed(0)  # dropout
        out = model(*model.inputs(SimpleNamespace(visual=visual, audio=audio)), lengths)
        objective(model, out, labels, lengths)["total"].backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for found in grads[1:]:
        torch.testing.assert_close(found, grads[0], rtol=0, atol=0)


def test_statistics_of_batches_that_were_read_before():
    visual, audio, _, lengths = batch([16, 9], 16)
    batches = iter([SimpleNamespace(lengths=lengths, visual=visual, audio=audio)])
    teacher(standardize=["audio"]).fit_inputs(batches)
    with pytest.raises(ValueError, match="statistics need a batch.*an iterator that was read before has none left"):
        student(standardize=["visual"]).fit_inputs(batches)


@pytest.mark.parametrize("name", ["Normal", " normal "])
def test_normal_is_the_first_class(name):
    with pytest.raises(DataError, match=f"normal must be the first of the classes; got fire, {name}"):
        teacher(classes=["fire", name])


MOVES = {"motion": True, "standardize": ["audio", "visual"]}


def test_sight_with_its_motion_is_the_sum_of_both_standardised(tmp_path):
    """Of sight and motion as they are, a model without motion sees their standardised sum; padding stays padding."""
    model, plain = teacher(**MOVES).eval(), teacher(standardize=["audio"]).eval()
    visual, audio, _, lengths = batch([16, 9], 16)
    motion = 5 + 0.2 * batch([16, 9], 16, seed=1)[0]
    motion[1, 9:] = 0
    both = torch.cat([visual, motion], -1)
    model.fit_inputs([SimpleNamespace(lengths=lengths, visual=both, audio=audio)])
    plain.fit_inputs([SimpleNamespace(lengths=lengths, visual=visual, audio=audio)])
    valid = torch.cat([both[0], both[1, :9]])
    scaled = (both - valid.mean(0)) / valid.std(0, correction=0)
    seen = scaled[..., :32] + scaled[..., 32:]
    expected = plain(seen, audio, lengths)
    both[1, 9:] = torch.nan
    for out, known in (
        (model(both, audio, lengths), expected),
        (model(both, None, lengths), plain(seen, None, lengths)),
    ):
        for n, b in ((16, 0), (9, 1)):
            torch.testing.assert_close(out.class_logits[b, :n], known.class_logits[b, :n], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "model")
    loaded = AVadCLIP.from_pretrained(tmp_path / "model")
    assert loaded.motion and torch.equal(loaded(both, audio, lengths).features, model(both, audio, lengths).features)
    sees, hears = (AVadCLIPStudent.beside(model, modality=modality) for modality in ("visual", "audio"))
    assert sees.motion and list(sees.standardize) == ["visual"] and not hears.motion
    with pytest.raises(ValueError, match=r"visual must have shape \[B, T, 64\], sight and its motion.*\[2, 16, 32\]"):
        model(visual, audio, lengths)
    with pytest.raises(ValueError, match="motion and sight are standardised and added up: add 'visual'"):
        teacher(motion=True, standardize=["audio"])


def test_a_dimension_that_never_varies_stays_finite():
    model = teacher(standardize=["audio"]).eval()
    visual, audio, _, lengths = batch([8, 8], 8)
    audio[..., 3] = 1.5
    audio[..., 4] *= 1e-4  # little, but it varies
    model.fit_inputs([SimpleNamespace(lengths=lengths, visual=visual, audio=audio)])
    assert model(visual, audio, lengths).features.isfinite().all()
    scaled = model.standardize["audio"](audio, lengths)
    torch.testing.assert_close(scaled[..., 4].std(correction=0), torch.tensor(1.0), rtol=1e-3, atol=0)


def test_what_does_not_fit_is_named():
    model = teacher()
    visual, audio, labels, lengths = batch([8, 5], 8)
    with pytest.raises(ValueError, match="at least two different names.*'abc'"):
        teacher(classes="abc")
    with pytest.raises(ValueError, match=r"standardize takes streams of the model.*'smell'"):
        teacher(standardize=["smell"])
    with pytest.raises(ValueError, match=r"text_features must have shape \[3, 32\].*\[3, 16\]"):
        model(visual, audio, lengths, text_features=torch.zeros(3, 16))
    for lower in (False, True):  # NumPy's own dtype, which autocast leaves as it is
        with (
            torch.autocast("cpu", enabled=lower),
            pytest.raises(ValueError, match="audio is torch.float64.*float32; cast"),
        ):
            model(visual, audio.double(), lengths)
    with pytest.raises(ValueError, match="labels must be a tensor, got list"):
        objective(model, model(visual, audio), labels.tolist())
    with pytest.raises(ValueError, match="visual is torch.float16, but the model is torch.float32; cast one, or use"):
        model(visual.half(), audio, lengths)
    pupil = student()
    for one, out in ((model, model(visual, audio, lengths)), (pupil, pupil.infer(visual, lengths=lengths))):
        with pytest.raises(ValueError, match="distil a student.*it is a teacher's, or was made by infer"):
            objective(one, out, labels, lengths, teacher_features=visual)
    with pytest.raises(ValueError, match="distill_loss: teacher must be a tensor, got ndarray"):
        objective(pupil, pupil(visual, lengths), labels, lengths, teacher_features=visual.numpy())


def test_a_student_beside_its_teacher_shares_the_frozen_text_side():
    one = teacher()
    two = AVadCLIPStudent.beside(one, window=8)
    for name, x in two.text.state_dict().items():
        assert torch.equal(x, one.text.state_dict()[name]) == (not name.startswith("prompt."))


def test_settings_of_a_student_beside_its_teacher():
    """One that is given wins, unless both must have the same."""
    one = teacher()
    length, width = one.temporal.positions.num_embeddings, one.width
    assert AVadCLIPStudent.beside(one).settings()["length"] == length
    two = AVadCLIPStudent.beside(one, length=length // 2, width=width, classes=tuple(one.classes))
    assert two.settings()["length"] == length // 2 == two.temporal.positions.num_embeddings
    moving = teacher(motion=True, standardize=["visual"])
    for guide, name, value in (
        (one, "width", 2 * width),
        (one, "classes", ["normal", "abnormal"]),
        (one, "text_width", 3 * width),
        (one, "text_layers", 5),
        (one, "text_weights", "openai"),
        (moving, "motion", False),
        (one, "motion", True),
    ):
        with pytest.raises(ValueError, match=f"^{name}=.*: a student has its teacher's {name}; leave it out$"):
            AVadCLIPStudent.beside(guide, **{name: value})
    assert not AVadCLIPStudent.beside(moving, motion=False, modality="audio").motion


@pytest.mark.parametrize("make", [teacher, student])
def test_inference_gives_the_same_scores(make):
    model = make().eval()
    visual, audio, _, lengths = batch([9, 16, 5], 16)
    streams = (visual, audio)[: len(model.streams())]
    out, lean = model(*streams, lengths), model.infer(*streams, lengths=lengths)
    assert torch.equal(lean.anomaly_logits, out.anomaly_logits) and torch.equal(lean.class_logits, out.class_logits)
    assert lean.log_variance is None  # only distillation asks how sure a student is


def test_only_the_prompt_of_the_text_side_learns():
    assert {n for n, p in teacher().text.named_parameters() if p.requires_grad} == {"prompt.weight"}


@pytest.mark.parametrize("make", [teacher, student])
def test_autocast(make):
    """bf16 products, float32 losses and gradients; the outputs agree to a few roundings of bf16 a layer."""
    model = make()
    visual, audio, labels, lengths = batch([9, 16, 5], 16)
    exact, exact_grads = run(make, model, visual, audio, labels, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(visual, audio, lengths) if make is teacher else model(visual, lengths)
        losses = objective(model, out, labels, lengths)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert relative(out.class_logits, exact.class_logits.detach()) < 0.05
    model.zero_grad()
    losses["total"].backward()
    for name, p in model.named_parameters():
        assert name not in exact_grads or p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all())


@pytest.mark.parametrize("make", [teacher, student])
def test_autocast_of_a_model_in_bf16_takes_float32(make):
    """A processor's LayerNorm refuses parameters narrower than its rows."""
    model = make()
    visual, audio, labels, lengths = batch([9, 16, 5], 16)
    exact, _ = run(make, model, visual, audio, labels, lengths)
    model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(visual, audio, lengths) if make is teacher else model(visual, lengths)
        total = objective(model, out, labels, lengths)["total"]
    assert relative(out.class_logits, exact.class_logits.detach()) < 0.05
    total.backward()
    gradient = model.temporal.resblocks[0].ln_1.weight.grad
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("padding", ["masked", "official"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("make", [teacher, student])
def test_layers_of_a_gpu_pass_on_autocasts_dtype(make, device, padding, monkeypatch):
    """No layer makes float32 of rows that came in bf16. A CPU passes on float32, and is taken for a GPU here."""
    monkeypatch.setattr(_autocast, "LOWERING", (device,))
    monkeypatch.setattr(groups, "pays", lambda x: False)
    model = make(padding=padding).to(device)
    visual, audio, labels, lengths = (x.to(device) for x in batch([9, 16, 5], 16))
    seen: dict[str, torch.dtype] = {}

    def note(module, inputs: tuple, out: Tensor | tuple, name: str) -> None:
        for place, found in (("before", inputs), ("after", out if isinstance(out, tuple) else (out,))):
            for x in found:
                if isinstance(x, Tensor) and x.shape == visual.shape:
                    seen[f"{place} {name}"] = x.dtype

    for name, module in model.named_modules():
        if name and not isinstance(module, torch.nn.LayerNorm):  # the model itself takes float32
            module.register_forward_hook(partial(note, name=name))
    with torch.autocast(device, torch.bfloat16):
        out = model(visual, audio, lengths) if make is teacher else model(visual, lengths)
        losses = objective(model, out, labels, lengths)
    losses["total"].backward()
    wide = [name for name, dtype in seen.items() if dtype != torch.bfloat16]
    assert not wide, wide
    assert len(seen) > 10 and out.features.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"standardize": ["visual"], "motion": True}], ids=["plain", "motion"])
@pytest.mark.parametrize("padding", ["masked", "official"])
@pytest.mark.parametrize("make", [teacher, student])
def test_a_gpu_takes_stored_float16_as_it_is(make, padding, settings, monkeypatch):
    """What casts its inputs gives the same bits whether they were float32 in between or not."""
    monkeypatch.setattr(_autocast, "LOWERING", ("cpu",))
    monkeypatch.setattr(groups, "pays", lambda x: False)
    model = make(padding=padding, **settings).eval()
    visual, audio, _, lengths = batch([9, 16, 5], 16, dtype=torch.float16)
    if settings:
        visual = torch.cat([visual, visual.flip(1)], dim=-1)
    streams = (visual, audio) if make is teacher else (visual,)
    with torch.autocast("cpu", torch.bfloat16):
        stored, wide = (model(*given, lengths) for given in (streams, [x.float() for x in streams]))
    assert torch.equal(stored.class_logits, wide.class_logits) and torch.equal(stored.features, wide.features)


@pytest.mark.parametrize("make", [teacher, student])
def test_compiles_and_exports_whole(make):
    model = make().eval()
    visual, audio, _, lengths = batch([9, 16], 16)
    inputs = (visual, audio, lengths) if make is teacher else (visual, lengths)
    expected = model(*inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    exported = torch.export.export(model, inputs).module()(*inputs)
    for other in (compiled, exported):
        torch.testing.assert_close(other.class_logits, expected.class_logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.anomaly_logits, expected.anomaly_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("padding", ["masked", "official"])
@pytest.mark.parametrize("make", [teacher, student])
def test_a_traced_model_takes_other_videos(make, padding, monkeypatch):
    """torch.jit.trace keeps whatever is read from a tensor: groups of like lengths, and windows of padding."""
    monkeypatch.setattr(groups, "WORTH", 1)
    model = make(padding=padding).eval().requires_grad_(False)
    streams = len(model.streams())

    def scores(*inputs: Tensor) -> Tensor:
        return model(*inputs).class_logits

    *first, _, lengths = batch([9, 16, 2, 1], 16)
    traced = torch.jit.trace(scores, (*first[:streams], lengths), check_trace=False)
    *other, _, lengths = batch([16, 3, 11], 16, seed=1)
    valid = torch.arange(16) < lengths[:, None]
    found, expected = (run(*other[:streams], lengths)[valid] for run in (traced, scores))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# The text side


@pytest.mark.parametrize("width", [64, 128])
def test_text_equals_all_77_positions(width):
    """Names of several lengths, one head and two: what is left out of the computation has no part in the result."""
    tokens = [TOKENS[0], [49406, *range(10, 31), 49407]]
    encoder = draw(TextEncoder(tokens, 16, width, 2))
    encoder.randomize()
    encoder = draw(encoder.double())
    state = {f"clipmodel.{k}": v for k, v in encoder.state_dict().items()}
    state["text_prompt_embeddings.weight"] = state["clipmodel.prompt.weight"]
    expected = plain_model.text(state, tokens, width // 64)
    torch.testing.assert_close(encoder(), expected, rtol=1e-10, atol=1e-10)


def test_text_equals_open_clip():
    """CLIP's own transformer over the same 77 rows; its weights are ours by name."""
    transformer = pytest.importorskip("open_clip.transformer")
    names = ["normal", "car accident", "a very long name of something that seldom happens in the street"]
    tokens = tokenize(names)
    assert len({len(t) for t in tokens}) == 3
    encoder = TextEncoder(tokens, 16, 128, 2)
    encoder.randomize()
    encoder = draw(encoder)
    clip = transformer.TextTransformer(width=128, heads=2, layers=2, output_dim=16, act_layer=transformer.QuickGELU)
    state = encoder.state_dict()
    clip.load_state_dict({name: state[name] for name in clip.state_dict()})
    for c, name in enumerate(tokens):
        eos = len(name) - 1
        x = encoder.prompt.weight.detach().clone()
        x[0], x[20 + eos] = clip.token_embedding.weight[name[0]], clip.token_embedding.weight[name[eos]]
        x[11 : 10 + eos] = clip.token_embedding.weight[name[1:eos]]
        h = clip.transformer((x + clip.positional_embedding)[None], attn_mask=clip.attn_mask)
        expected = clip.ln_final(h)[0, 20 + eos] @ clip.text_projection
        torch.testing.assert_close(encoder()[c], expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_clips():
    open_clip = pytest.importorskip("open_clip")
    for name, codes in zip(CLASSES, tokenize(CLASSES), strict=True):
        row = open_clip.tokenize([name])[0].tolist()
        assert row[: len(codes)] == codes and not any(row[len(codes) :])
        assert codes[0] == 49406 and codes[-1] == 49407


def test_the_longest_name():
    for count, fits in ((55, True), (56, False)):
        tokens = [TOKENS[0], [49406, *range(100, 100 + count), 49407]]
        if fits:
            assert TextEncoder(tokens, 16, 64, 1)().shape == (2, 16)
        else:
            with pytest.raises(ValueError, match="class name number 2 has 56 tokens; at most 55 fit"):
                TextEncoder(tokens, 16, 64, 1)
    with pytest.raises(ValueError, match="has 75 tokens or more; at most 55 fit"):  # CLIP's tokenizer cuts the rest off
        TextEncoder(tokenize(["fire " * 200]), 16, 64, 1)


def test_a_name_does_not_change_the_others():
    """Another class, longer than all before, leaves the features of the rest as they were."""
    encoder = TextEncoder(TOKENS, 16, 64, 1)
    encoder.randomize()
    before = encoder()
    encoder.set_tokens([*TOKENS, [49406, *range(100, 130), 49407]])
    torch.testing.assert_close(encoder()[: len(TOKENS)], before)


def test_random_weights_are_those_of_the_seed():
    one, two, three = (TextEncoder(TOKENS, 16, 64, 1) for _ in range(3))
    for encoder, seed in ((one, 3), (two, 3), (three, 4)):
        state = torch.get_rng_state()
        encoder.randomize(seed)
        assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers change
    assert torch.equal(one.text_projection, two.text_projection)
    assert not torch.equal(one.text_projection, three.text_projection)
