"""Modules: the official parameter names, the formulas they stand for, what they refuse, and which backend serves."""

import inspect
import math
import os
import pickle
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_models import CLASSES, SIZES, TOKENS, batch, draw, student, teacher
from torch import nn
from torch._subclasses import FakeTensorMode

import avadclip_fast
from avadclip_fast import (
    AVadCLIP,
    AVFusion,
    AVPrompt,
    BackendError,
    DistanceGraph,
    MILAlignLoss,
    MILLoss,
    PromptSimilarity,
    SimilarityGraph,
    TemporalAggregator,
    TopKMean,
    UncertaintyDistillationLoss,
    UncertaintyHead,
    WindowAttention,
    objective,
    ops,
    use_backend,
)
from avadclip_fast.models.encoder import TemporalEncoder
from avadclip_fast.modules import MLP, TemporalConvNet
from avadclip_fast.modules.gated_fusion import MODES
from avadclip_fast.ops import _dispatch, _linear_act_cpu
from avadclip_fast.ops._linear_act_cpu import spares

B, T, D, C = 2, 11, 16, 3
LENGTHS = torch.tensor([4, 11])


def layers(*names: str) -> set[str]:
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X = rows(B, T, D)
LABELS = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
# module, its arguments, the official names of its parameters
MODULES = {
    "AVFusion": (AVFusion, (D,), (X, X + 1), layers("gate_proj.0", "residual_proj.0", "residual_proj.2")),
    "AVPrompt": (AVPrompt, (D,), (X, rows(C, D), rows(B, T), LENGTHS), layers("mlp1.c_fc", "mlp1.c_proj")),
    "DistanceGraph": (DistanceGraph, (), (X, LENGTHS), {"sigma"}),
    "MILAlignLoss": (MILAlignLoss, (C,), (rows(B, T, C), LABELS, LENGTHS), {"alpha"}),
    "MILLoss": (MILLoss, (), (rows(B, T), LABELS, LENGTHS), set()),
    "MLP": (MLP, (D,), (X,), layers("c_fc", "c_proj")),
    "PromptSimilarity": (PromptSimilarity, (), (X, rows(B, C, D)), set()),
    "SimilarityGraph": (SimilarityGraph, (), (X, X + 1, LENGTHS), set()),
    "TemporalAggregator": (
        TemporalAggregator,
        (D,),
        (X, LENGTHS),
        layers("gc1.residual", "gc3.residual", "linear")
        | {"gc1.weight", "gc2.weight", "gc3.weight", "gc4.weight", "disAdj.sigma"},
    ),
    "TemporalConvNet": (
        TemporalConvNet,
        (D, 3, 2, 0.0),
        (X,),
        {f"network.{i}.conv{j}.{p}" for i in range(3) for j in (1, 2) for p in ("bias", "weight_g", "weight_v")},
    ),
    "TopKMean": (TopKMean, (), (X, LENGTHS), set()),
    "UncertaintyDistillationLoss": (UncertaintyDistillationLoss, (), (X, X + 1, X - 1, LENGTHS), set()),
    "UncertaintyHead": (
        UncertaintyHead,
        (D,),
        (X, LENGTHS),
        layers("conv.0.conv.0", "conv.1.conv.0", "conv.2.conv.0", "theta.theta.0", "theta.theta.2", "theta.theta.3"),
    ),
    "WindowAttention": (WindowAttention, (D, 4), (X,), set(nn.MultiheadAttention(D, 1).state_dict())),
}
every_module = pytest.mark.parametrize("name", MODULES)


def first(out) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.fixture
def served(monkeypatch) -> list[tuple[str, str | None]]:
    """Every (op, backend asked for) from here on."""
    calls, run = [], _dispatch.run
    monkeypatch.setattr(
        _dispatch, "run", lambda op, backend, *a, **k: (calls.append((op, backend)), run(op, backend, *a, **k))[1]
    )
    return calls


def test_every_public_module_is_here():
    public = {n for n in avadclip_fast.__all__ if isinstance(getattr(avadclip_fast, n), type)}
    assert public - {"AVadCLIP", "AVadCLIPStudent", "BackendError"} <= set(MODULES)


@every_module
def test_parameters_carry_the_official_names(name):
    make, settings, _, names = MODULES[name]
    assert set(make(*settings).state_dict()) == names


@every_module
def test_a_state_dict_comes_back(name):
    make, settings, inputs, _ = MODULES[name]
    one, two = draw(make(*settings), 1), draw(make(*settings), 2)
    expected = first(one(*inputs))
    if list(one.parameters()) and name != "DistanceGraph":  # whose sigma is used by nothing
        assert not torch.equal(first(two(*inputs)), expected)
    two.load_state_dict(one.state_dict())
    assert torch.equal(first(two(*inputs)), expected)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "TemporalAggregator"])  # that has no `backend`
def test_the_backend_asked_for_serves_every_op(name, served):
    make, settings, inputs, _ = MODULES[name]
    make(*settings, backend="reference")(*inputs)
    assert served and {backend for _, backend in served} == {"reference"}
    with pytest.raises(BackendError, match=r"backend 'cuda' cannot serve this call: .+"):
        make(*settings, backend="cuda")(*inputs)


# Which backend serves


def test_a_backend_an_op_has_not_says_which_it_has():
    with pytest.raises(BackendError, match="topk_mean: backend 'triton' .*not implemented for this op, which has: ref"):
        ops.topk_mean(rows(1, 4, 2), torch.tensor([4]), backend="triton")


def test_use_backend_holds_inside_its_block_alone():
    with pytest.raises(BackendError, match="backend 'cuda'"), use_backend("cuda"):
        MILLoss()(rows(B, T), LABELS, LENGTHS)
    with use_backend("cuda"):
        with use_backend("reference"):
            MILLoss()(rows(B, T), LABELS, LENGTHS)
        with pytest.raises(BackendError, match="backend 'cuda'"):
            MILLoss()(rows(B, T), LABELS, LENGTHS)
    MILLoss()(rows(B, T), LABELS, LENGTHS)  # nothing is forced any more


def test_a_modules_backend_goes_before_the_context():
    with use_backend("cuda"):
        MILLoss(backend="reference")(rows(B, T), LABELS, LENGTHS)


def test_use_backend_leaves_alone_what_has_no_such_backend():
    """No Triton kernel exists for topk_mean: asked for all ops it is passed over, asked for this one it is refused."""
    assert "triton" not in _dispatch.TABLE["topk_mean"]
    with use_backend("triton"):
        TopKMean()(rows(1, 4, 2), torch.tensor([4]))


def test_a_backend_asked_for_a_call_is_not_passed_over():
    """Though the one that is asked for all ops would be."""
    with use_backend("triton"), pytest.raises(BackendError, match="topk_mean: backend 'cuda' cannot serve"):
        ops.topk_mean(rows(1, 4, 2), torch.tensor([4]), backend="cuda")


def test_use_backend_refuses_an_unknown_name():
    with (
        pytest.raises(ValueError, match="unknown backend 'fpga'; one of cuda, triton, amx, cpp, onednn, reference"),
        use_backend("fpga"),
    ):
        pass


def test_the_environment_forces_a_backend():
    code = "import torch; from avadclip_fast import ops; ops.topk_mean(torch.zeros(1, 4, 2), torch.tensor([4]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "AVADCLIP_FAST_BACKEND": "cuda"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "BackendError: topk_mean: backend 'cuda' cannot serve" in done.stderr


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(("value", "forced"), [("", None), ("cpp", "cpp")])
def test_an_empty_variable_of_the_environment_forces_none(monkeypatch, value, forced):
    monkeypatch.setenv("AVADCLIP_FAST_BACKEND", value)
    assert runpy.run_module(_dispatch.__name__)["_forced"] == forced


def test_an_unknown_backend_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setattr(_dispatch, "_forced", "fpga")
    with pytest.raises(BackendError, match="topk_mean: backend 'fpga' cannot serve this call: unknown backend"):
        ops.topk_mean(rows(1, 4, 2), torch.tensor([4]))
    with pytest.raises(BackendError, match="AVADCLIP_FAST_BACKEND=fpga: unknown backend; one of cuda"):
        _dispatch.forced()


@pytest.mark.parametrize("module", ["avadclip_fast", "avadclip_fast.cli.media"])
def test_import_is_light(module):
    heavy = ["open_clip", "matplotlib", "sklearn", "triton", "tensorboard", "av"]
    heavy += ["huggingface_hub", "typer"] * (module == "avadclip_fast")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_windows_has_the_modules_and_is_told_what_the_models_need():
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "import torch, avadclip_fast\n"
        "print(*avadclip_fast.AVFusion(8)(torch.ones(1, 2, 8), torch.ones(1, 2, 8)).shape)\n"
        "avadclip_fast.AVadCLIP"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "1 2 8\n"
    assert done.stderr.splitlines()[-1].endswith("on Windows, install it in WSL")


# Settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AVFusion(D, mode="sum"),
            "AVFusion: mode must be one of gated, add, concat, cross_attention; got 'sum'",
        ),
        (
            lambda: AVFusion(20, mode="cross_attention"),
            "AVFusion: cross_attention has 8 heads, and dim must be a multiple; got 20",
        ),
        (
            lambda: AVFusion(D, mode="add", backend="triton"),
            "AVFusion: mode 'add' has no backend but 'reference'; got 'triton'",
        ),
        (lambda: AVPrompt(D, prompt="own"), "AVPrompt: prompt must be 'official' or 'paper', got 'own'"),
        (lambda: TemporalAggregator(1), "TemporalAggregator: dim // 2 must be a whole number above zero, got 0"),
        (lambda: WindowAttention(0), "WindowAttention: dim must be a whole number above zero, got 0"),
        (lambda: TemporalConvNet(0), "TemporalConvNet: dim must be a whole number above zero, got 0"),
        (lambda: TemporalConvNet(D, levels=0), "TemporalConvNet: levels must be a whole number above zero, got 0"),
        (lambda: TemporalConvNet(D, dropout=1.5), r"TemporalConvNet: dropout must lie in 0\.\.1, got 1.5"),
        (lambda: TemporalAggregator(D, padding="none"), "padding must be 'official' or 'masked', got 'none'"),
        (lambda: teacher(padding="none"), "padding must be 'official' or 'masked', got 'none'"),
        (lambda: teacher(prompt="own"), "prompt must be 'official' or 'paper', got 'own'"),
        (lambda: teacher(fusion="sum"), "mode must be one of .*; got 'sum'"),
        (lambda: teacher(classes=["normal"]), r"at least two different names, normal first; got \['normal'\]"),
        (lambda: teacher(classes=["a", "a", "b"]), "at least two different names"),
        (lambda: teacher(classes=[0, 1, 2]), r"names, normal first; got \[0, 1, 2\]"),
        (lambda: teacher(class_tokens=[[49406, 5, 49407]]), "class_tokens must be one list a class, 3, got 1"),
        (lambda: teacher(class_tokens=[[*t, 0] for t in TOKENS]), "to .EOS. 49407, without padding"),
        (lambda: teacher(class_tokens=torch.tensor([[49406, 5, 49407, 0]] * 3)), "to .EOS. 49407, without padding"),
        (lambda: teacher(dropout=-0.1), r"dropout must lie in 0\.\.1, got -0.1"),
        (lambda: teacher(dropout=None), r"dropout must lie in 0\.\.1, got None"),
        (lambda: teacher(layers=-1), "AVadCLIP: layers must be a whole number, 0 or more, got -1"),
        (lambda: student(layers=1.5), "AVadCLIPStudent: layers must be a whole number, 0 or more, got 1.5"),
        (lambda: teacher(width=-32), "AVadCLIP: width must be a whole number above zero, got -32"),
        (lambda: student(length=0), "AVadCLIPStudent: length must be a whole number above zero, got 0"),
        (lambda: teacher(text_layers=0), "AVadCLIP: text_layers must be a whole number above zero, got 0"),
        (lambda: teacher(text_width=200), "text_width must be a multiple of 64, .* or below 128; got 200"),
        (lambda: teacher(standardize="audio"), r"a list of \('visual', 'audio'\); got 'audio'"),
        (lambda: student(modality="text"), "modality must be 'visual' or 'audio', got 'text'"),
    ],
)
def test_refuses_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [AVFusion, TemporalAggregator, TemporalConvNet, UncertaintyHead, WindowAttention])
def test_modules_name_themselves_and_what_they_are_given(kind):
    """Not an op within them, or their weights."""
    rule = r"must have shape \[B, T, 16\], got"
    for module in [kind(D)] if kind is not AVFusion else [AVFusion(D, mode) for mode in MODES]:
        for given, lengths, message in (
            (X.numpy(), None, "must be a tensor, got ndarray"),
            (X[0], None, rf"{rule} \[{T}, 16\]"),
            (X[..., 1:], None, rf"{rule} \[{B}, {T}, 15\]"),
            (rows(B, T, 2 * D), None, rf"{rule} \[{B}, {T}, 32\]"),
            (rows(B, T, 0), None, rf"{rule} \[{B}, {T}, 0\]"),
            (X, torch.tensor([T, 0]), rf"lengths must lie in 1\.\.{T}, got 0\.\.{T}"),
            (X, torch.tensor([T]), rf"lengths must have shape \[{B}\], got \[1\]"),
        ):
            with pytest.raises(ValueError, match=rf"^{kind.__name__}: \w* ?{message}"):
                module(*[given] * (2 if kind is AVFusion else 1), lengths=lengths)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_videos_of_several_lengths_come_padded(layout):
    """A nested tensor has no T; torch's errors would be about an attribute, or ask for an issue to be filed."""
    nested = torch.nested.nested_tensor([rows(24, 32), rows(7, 32)], layout=layout)
    for name, call in (
        ("visual", lambda: teacher()(nested, nested)),
        ("visual", lambda: student()(nested)),
        ("x", lambda: TemporalAggregator(32)(nested)),
        ("values", lambda: ops.distance_graph(nested)),
    ):
        remedy = rf"a nested one; give {name}.to_padded_tensor\(0.0\), and lengths"
        with pytest.raises(ValueError, match=f": {name} must be a padded tensor, got {remedy}"):
            call()


def test_refuses_features_of_another_width():
    with pytest.raises(ValueError, match=r"visual must have shape \[B, T, 32\]; got \[1, 5, 16\]"):
        student()(rows(1, 5, 16))


@pytest.mark.parametrize("count", [0, 25])
def test_refuses_no_rows_and_more_than_positions(count):
    with pytest.raises(ValueError, match=f"T={count} does not lie in 1..24"):
        student()(rows(1, count, 32))


@pytest.mark.parametrize("shape", [(D,), (B, C, D), (C, D + 1)])
def test_a_prompt_refuses_other_text(shape):
    with pytest.raises(ValueError, match=r"AVPrompt: text must have shape \[C, D\]"):
        AVPrompt(D)(X, rows(*shape), rows(B, T))


def test_settings_may_be_numpys_numbers():
    assert torch.equal(TopKMean(np.int64(4))(X, LENGTHS), TopKMean(4)(X, LENGTHS))
    assert torch.equal(DistanceGraph(np.float64(2.0))(X), DistanceGraph(2.0)(X))


# Formulas of norms that linear_act does not know


@pytest.mark.parametrize("settings", [{"eps": 1e-2}, {"elementwise_affine": False}, {"bias": False}])
def test_a_norm_is_the_callers(settings):
    norm, x = draw(nn.LayerNorm(D, **settings)), rows(1, 64, D)
    mlp, attention = draw(MLP(D)), draw(WindowAttention(D, 4))
    torch.testing.assert_close(mlp(x, norm=norm), mlp(norm(x)))
    torch.testing.assert_close(attention(x, norm=norm), attention(norm(x)))
    few = x[:, :8]  # fewer rows than D: the attention is not folded
    torch.testing.assert_close(attention(few, norm=norm), attention(norm(few)))


@pytest.mark.parametrize("norm", [nn.RMSNorm(D, eps=1e-5), nn.BatchNorm1d(D).eval(), nn.Identity()])
def test_another_norm_is_no_layer_norm(norm):
    x, mlp, attention = rows(1, D, D), draw(MLP(D)), draw(WindowAttention(D, 4))
    torch.testing.assert_close(mlp(x, norm=norm), mlp(norm(x)))
    torch.testing.assert_close(attention(x, norm=norm), attention(norm(x)))


# torch.func, forward-mode AD, torch.export, meta


def test_torch_func_differentiates_a_model():
    """Once more by torch.func: the same gradient."""
    model = teacher()
    visual, audio, labels, lengths = batch([24, 7], 24)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict) -> torch.Tensor:
        out = torch.func.functional_call(model, parameters, (visual, audio, lengths))
        return out.anomaly_logits.sigmoid().sum() + out.class_logits.square().mean()

    learned = [name for name, p in parameters.items() if p.requires_grad and not name.startswith("align_loss")]
    expected = torch.autograd.grad(loss(parameters), [parameters[name] for name in learned])
    found = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    for name, gradient in zip(learned, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_operators_are_passed_over_where_torch_func_is_at_work():
    """They know nothing of tangents and batches: a tangent would be lost, and a gradient wrong."""
    x = rows(2, 300, 256)
    graph = DistanceGraph()
    along = torch.ones_like(x)
    _, tangent = torch.func.jvp(graph, (x,), (along,))
    torch.testing.assert_close(tangent, graph(along))  # it is linear
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, along)
        _, tangent = torch.autograd.forward_ad.unpack_dual(graph(dual))
    torch.testing.assert_close(tangent, graph(along))
    weights = rows(3, 256, 256).requires_grad_()

    def layers(backend: str | None) -> torch.Tensor:
        return torch.func.vmap(lambda w: ops.linear_act(x, w, None, "quick_gelu", backend=backend))(weights)

    ours, expected = (torch.autograd.grad(layers(backend).sum(), weights)[0] for backend in (None, "reference"))
    torch.testing.assert_close(ours, expected)
    if _dispatch.why_not("distance_graph", "cpp", x, 1.0, None) is None:
        with pytest.raises(BackendError, match="torch.func and forward-mode AD go by the reference"):
            torch.func.jvp(DistanceGraph(backend="cpp"), (x,), (along,))


@pytest.mark.parametrize(
    "make",
    [lambda: WindowAttention(256), lambda: TemporalConvNet(256), lambda: TemporalEncoder(256, 256, 64, 1)],
    ids=["attention", "tcn", "encoder"],
)
def test_an_exported_graph_takes_any_batch_at_the_models_sizes(make):
    """From some size on, a processor's own products pay; nothing in a graph may depend on it."""
    module, size = draw(make()).eval(), torch.export.Dim("batch", min=1)
    program = torch.export.export(module, (rows(2, 256, 256),), dynamic_shapes=({0: size},)).module()
    for count in (1, 3):
        x = rows(count, 256, 256)
        torch.testing.assert_close(program(x), module(x), rtol=1e-4, atol=1e-4)


def test_an_exported_model_is_saved_and_returns_its_output_again(tmp_path):
    model = student().eval()
    visual, _, _, lengths = batch([24, 7], 24)
    torch.export.save(torch.export.export(model, (visual, lengths)), tmp_path / "student.pt2")
    found = torch.export.load(tmp_path / "student.pt2").module()(visual, lengths)
    torch.testing.assert_close(found._asdict(), model(visual, lengths)._asdict(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_made_on_meta_gets_all_with_its_weights(assign):
    model = teacher().eval()
    with torch.device("meta"):
        empty = AVadCLIP(CLASSES, class_tokens=TOKENS, **SIZES | {"text_weights": None}).eval()
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=assign)
    visual, audio, _, lengths = batch([24, 7], 24)
    for ours, expected in zip(empty(visual, audio, lengths), model(visual, audio, lengths), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_model_made_on_meta_is_filled_parameter_by_parameter():
    """As own initialisations and sharded models do: the rows of the text side are no parameters."""
    model = teacher().eval()
    with torch.device("meta"):
        empty = teacher().eval()
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for ours, given in zip(empty.parameters(), model.parameters(), strict=True):
            ours.copy_(given)
    visual, audio, _, lengths = batch([24, 7], 24)
    assert torch.equal(empty(visual, audio, lengths).class_logits, model(visual, audio, lengths).class_logits)


@pytest.mark.parametrize("padding", ["masked", "official"])
@pytest.mark.parametrize("make", [teacher, student])
def test_what_inference_mode_makes_trains_a_model(make, padding, monkeypatch):
    """Features, labels and lengths. Our operators save some of them for their backward pass, whatever serves."""
    monkeypatch.setattr(_linear_act_cpu, "ROWS", 1)
    monkeypatch.setattr(_linear_act_cpu, "WIDTH", 1)
    model = make(padding=padding)

    def gradient(visual: torch.Tensor, audio: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor):
        out = model(*(visual, audio)[: len(model.streams())], lengths)
        loss = objective(model, out, labels, lengths)["total"]
        return torch.autograd.grad(loss, model.temporal.positions.weight)[0]

    with torch.inference_mode():
        made = batch([24, 7], 24)
    assert torch.equal(gradient(*made), gradient(*batch([24, 7], 24)))


@pytest.mark.parametrize("padding", ["masked", "official"])
@pytest.mark.parametrize("make", [teacher, student])
def test_a_model_computes_shapes_on_meta(make, padding):
    model = make(padding=padding).to("meta")
    visual, audio, _, lengths = (x.to("meta") for x in batch([24, 7], 24))
    found = model(*(visual, audio)[: len(model.streams())], lengths)
    assert found.features.shape == (2, 24, 32) and found.class_logits.shape == (2, 24, 3) and found.features.is_meta


@pytest.mark.parametrize("padding", ["masked", "official"])
@pytest.mark.parametrize("make", [teacher, student])
def test_a_model_computes_shapes_of_fake_tensors(make, padding):
    """Of 40 videos, which would be grouped by length, or told apart by what they hold."""
    with FakeTensorMode():
        model = make(padding=padding)
        visual, audio = torch.randn(2, 40, 24, 32)
        out = model(*(visual, audio)[: len(model.streams())], torch.randint(1, 25, (40,)))
        out.class_logits.sum().backward()
    assert out.features.shape == (40, 24, 32) and out.class_logits.shape == (40, 24, 3)
    assert model.prompt.mlp1.c_fc.weight.grad.shape == model.prompt.mlp1.c_fc.weight.shape


def test_a_model_is_pickled_and_loads_in_place():
    """A CUDA graph reads the same memory after weights were loaded."""
    model = teacher().eval()
    copy = pickle.loads(pickle.dumps(model))  # noqa: S301  our own
    tensors = [x.data_ptr() for x in (*copy.parameters(), *copy.buffers())]
    copy.load_state_dict(teacher(seed=1).state_dict())
    copy.load_state_dict(model.state_dict())
    assert tensors == [x.data_ptr() for x in (*copy.parameters(), *copy.buffers())]
    visual, audio, _, lengths = batch([24, 7], 24)
    assert torch.equal(copy(visual, audio, lengths).class_logits, model(visual, audio, lengths).class_logits)


# Formulas


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all", "lengths"])
def test_fusion_modes(lengths):
    v, a = rows(B, T, D), rows(B, T, D + 1)[..., 1:]
    z = torch.cat([v, a], dim=-1)
    assert torch.equal(AVFusion(D, "add")(v, a, lengths), v + a)
    concat = AVFusion(D, "concat")
    torch.testing.assert_close(concat(v, a, lengths), z @ concat.proj.weight.T + concat.proj.bias)
    gated = draw(AVFusion(D))
    hidden = nn.functional.gelu(gated.residual_proj[0](z))
    expected = v + torch.sigmoid(gated.gate_proj[0](z)) * gated.residual_proj[2](hidden)
    torch.testing.assert_close(gated(v, a, lengths), expected)
    cross = draw(AVFusion(D, "cross_attention"))
    for b in range(B):
        n = T if lengths is None else lengths[b]
        heard, _ = cross.attention(v[b : b + 1], a[b : b + 1, :n], a[b : b + 1, :n])
        torch.testing.assert_close(cross(v, a, lengths)[b], v[b] + heard[0])
    if lengths is not None:  # a padded row may hold anything
        void = a.masked_fill(torch.arange(T)[:, None] >= lengths[:, None, None], torch.nan)
        torch.testing.assert_close(cross(v, void, lengths), cross(v, a, lengths))


@pytest.mark.parametrize("mode", MODES)
def test_fusion_refuses_streams_of_two_shapes(mode):
    with pytest.raises(ValueError, match=r"\[2, 11, 16\].*\[2, 10, 16\]|\[2, 10, 16\]"):
        AVFusion(D, mode)(rows(B, T, D), rows(B, T - 1, D))


@pytest.mark.parametrize("mode", ["gated", "concat", "cross_attention"])
def test_fusion_refuses_streams_of_another_dtype_than_its_weights(mode):
    with pytest.raises(ValueError, match=r"weight is torch.float32, but visual is torch.float64; cast one"):
        AVFusion(D, mode)(X.double(), X.double())


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all", "lengths"])
@pytest.mark.parametrize("form", ["official", "paper"])
def test_prompt_forms(form, lengths):
    prompt = draw(AVPrompt(D, form)).double()
    features, text, logits = rows(B, T, D).double(), rows(C, D).double(), rows(B, T).double()
    out = prompt(features, text, logits, lengths)
    c_fc, c_proj = prompt.mlp1.c_fc, prompt.mlp1.c_proj
    for b in range(B):
        g = sum(logits[b, t] * features[b, t] for t in range(T if lengths is None else lengths[b]))
        g = g / g.norm()
        scores = [math.exp(text[c] @ g) for c in range(C)]
        for c in range(C):
            y = text[c] + (g if form == "official" else scores[c] / sum(scores) * g)
            h = c_fc(y)
            x = c_proj(h * torch.sigmoid(1.702 * h)) + (y if form == "official" else text[c])
            for t in range(T):
                cosine = features[b, t] @ x / (features[b, t].norm() * x.norm())
                torch.testing.assert_close(out[b, t, c], cosine / 0.07)


def test_window_attention_is_torchs_under_a_block_mask():
    ours, theirs = draw(WindowAttention(D, 4, heads=2)), nn.MultiheadAttention(D, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    window = torch.arange(T) // 4
    expected, _ = theirs(X, X, X, attn_mask=window[:, None] != window)
    torch.testing.assert_close(ours(X), expected)


def test_weight_norm_is_torchs():
    net = draw(TemporalConvNet(D, dropout=0.0))
    conv = net.network[1].conv1
    plain = nn.utils.parametrizations.weight_norm(nn.Conv1d(D, D, 2, dilation=2))
    plain.parametrizations.weight.original0.data = conv.weight_g.data
    plain.parametrizations.weight.original1.data = conv.weight_v.data
    plain.bias.data = conv.bias.data
    expected = plain(nn.functional.pad(X.transpose(1, 2), (2, 0))).transpose(1, 2)
    torch.testing.assert_close(conv(X), expected)


def test_dropout_works_in_training_alone():
    net = draw(TemporalConvNet(D, dropout=0.5))
    assert not torch.equal(net(X), net(X))
    net.eval()
    assert torch.equal(net(X), net(X))


def test_dropout_follows_both_convolutions_of_a_level():
    net, given = draw(TemporalConvNet(D, levels=1, dropout=1.0)), []
    net.network[0].conv2.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    assert torch.equal(net(X), X.relu()) and not given[0].any()


def test_tcn_is_the_same_where_zeros_need_no_products():
    width, ends = 256, torch.tensor([200, 1, 90, 0])  # the last is silent
    x = rows(4, 200, width) * (torch.arange(200) < ends[:, None])[..., None]
    if not spares(x):
        pytest.skip("no products of this processor's own: nothing is left out")
    net, given = draw(TemporalConvNet(width, levels=2)).eval(), []
    net.network[0].conv1.register_forward_pre_hook(lambda _, inputs: given.append(inputs[4]))
    found = []
    for backend in (None, "reference"):
        with use_backend(backend):
            out = net(x)
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(net.parameters()))])
    assert torch.equal(given[0], ends.clamp_min(1)) and given[1] is None
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_models_are_those_of_the_paper_by_default():
    one = avadclip_fast.AVadCLIP(["a", "b"], class_tokens=TOKENS[:2], text_layers=1, text_weights=None).settings()
    two = avadclip_fast.AVadCLIPStudent(["a", "b"], class_tokens=TOKENS[:2], text_layers=1, text_weights=None)
    assert (one["window"], one["layers"], one["length"], one["heads"], one["dropout"]) == (4, 2, 256, 1, 0.1)
    assert [two.settings()[name] for name in ("window", "layers", "length", "heads")] == [64, 1, 256, 1]


def test_the_modules_and_ops_are_those_of_the_paper_by_default():
    paper = {
        "dim": 512, "temperature": 0.07, "threshold": 0.7, "divisor": 16, "alpha": 0.25, "window": 64, "heads": 1,
        "levels": 3, "taps": 2, "dropout": 0.1,
    }  # fmt: skip
    found = [
        (one.__name__, name, p.default)
        for one in (
            AVFusion, AVPrompt, MILAlignLoss, MILLoss, PromptSimilarity, SimilarityGraph, TemporalAggregator,
            TemporalConvNet, TopKMean, UncertaintyHead, WindowAttention, ops.mil_loss, ops.mil_align_loss,
            ops.prompt_similarity, ops.similarity_graph, ops.topk_mean,
        )
        for name, p in inspect.signature(one).parameters.items()
        if name in paper and p.default is not p.empty
    ]  # fmt: skip
    assert {name for _, name, _ in found} == paper.keys()
    assert [one for one in found if one[2] != paper[one[1]]] == []


def test_a_dropout_of_numpys_trains():
    x = rows(2, 5, D)
    assert TemporalConvNet(D, dropout=np.float32(0.5)).train()(x).shape == x.shape


def test_a_misspelt_name_of_the_package_is_an_error():
    with pytest.raises(AttributeError, match="module 'avadclip_fast' has no attribute 'AVadClip'"):
        avadclip_fast.AVadClip  # noqa: B018


def test_refuses_a_fusion_on_two_devices():
    with pytest.raises(ValueError, match="audio is on meta, but visual is on cpu"):
        AVFusion(D)(X, X.to("meta"))
