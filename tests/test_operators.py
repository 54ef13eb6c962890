"""torch.ops.avadclip_fast called directly, past the checks in Python: what does not fit raises, and nothing is read
out of bounds (`make sanitize` runs this too). Numbers that are not finite, ties and threads, against the reference."""

import math
import re
from pathlib import Path

import pytest
import torch
from cases import convert, leaves
from hypothesis import given, settings
from hypothesis import strategies as st
from op_tests import on_both_units
from torch import Tensor

from avadclip_fast import _build, ops
from avadclip_fast.ops._linear_act_cpu import HAS_AMX, HAS_AVX512

pytestmark = pytest.mark.skipif(_build.CPP_MISSING is not None, reason=str(_build.CPP_MISSING))

OPS = torch.ops.avadclip_fast
CSRC = Path(__file__).parents[1] / "csrc"
B, T, D, C, N = 3, 6, 4, 2, 11  # all different, so that a size tells what it is of
LENGTHS = [6, 1, 4]  # their sum is N


def calls() -> dict[str, tuple]:
    """A call of every operator that fits."""
    torch.manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    labels = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    graph = torch.rand(B, T, T)
    index = torch.tensor([5, -1, -1, -1, -1], dtype=torch.int32).repeat(B, C, 1)
    x, weight, bias = torch.randn(B, T, D), torch.randn(C, D, 5), torch.randn(C)
    y = torch.randn(B, T, C)
    tiles = {
        "linear_act_tiles": (
            *(x, weight, bias, "quick_gelu", y, 1, False, lengths, lengths, None, True, y > 0, 2.0, HAS_AMX, False),
        ),
        "linear_act_tiles_backward": (
            *(y[..., 0], x, weight, "quick_gelu", 1, False, lengths, lengths, bias, y, [True] * 4, y > 0, 2.0),
            *(HAS_AMX, False),
        ),
    }
    return (tiles if HAS_AVX512 else {}) | {
        "topk_mean": (torch.randn(B, T, C), lengths, 2),
        "topk_mean_backward": (torch.randn(B, C), index, T),
        "mil_loss": (torch.randn(B, T), labels, lengths, 2),
        "mil_loss_backward": (torch.randn(()), torch.randn(B, T)),
        "mil_align_loss": (torch.randn(B, T, C), labels, lengths, torch.rand(C), 2),
        "mil_align_loss_backward": (torch.randn(()), torch.randn(B, T, C), torch.randn(C)),
        "distance_graph": (torch.randn(B, T, D), 2.0, lengths),
        "uniform_pool": (torch.randn(N, D), lengths, 5),
        "uniform_pool_backward": (torch.randn(B, 5, D), lengths, N),
        "pack_rows": (torch.randn(B, T, D), lengths, N),
        "unpack_rows": (torch.randn(N, D), lengths, T),
        "similarity_graph": (torch.randn(B, T, D), torch.randn(B, T, C), lengths, 0.7),
        "similarity_graph_backward": (
            *(torch.randn(B, T, C), torch.randn(B, T, T), torch.randn(B, T, D), torch.randn(B, T, C), graph, graph),
            *(lengths, 0.7),
        ),
        "similarity_mix": (graph, torch.randn(B, T, C), lengths),
        "similarity_mix_backward": (torch.randn(B, T, C), graph, torch.randn(B, T, C), lengths),
    }


NAMES = sorted(calls())
# (operator, argument, dimension) whose size no other argument fixes
FREE = {
    *(("topk_mean", "scores", d) for d in (1, 2)),
    ("topk_mean_backward", "index", 2),
    *(("mil_loss", x, 1) for x in ("logits", "labels")),
    *(("mil_loss_backward", "slope", d) for d in (0, 1)),
    ("mil_align_loss", "logits", 1),
    *(("mil_align_loss_backward", "slope", d) for d in (0, 1, 2)),
    ("mil_align_loss_backward", "alpha_slope", 0),
    *(("distance_graph", "values", d) for d in (1, 2)),
    ("uniform_pool", "features", 1),
    *(("uniform_pool_backward", "grad", d) for d in (1, 2)),
    *(("pack_rows", "padded", d) for d in (1, 2)),
    ("unpack_rows", "packed", 1),
    *(("similarity_graph", x, 2) for x in ("features", "values")),
    ("similarity_graph_backward", "features", 2),
    ("similarity_mix", "values", 2),
    *((f"linear_act_tiles{which}", "weight", 2) for which in ("", "_backward")),
}
ANY_RANK = {("mil_loss_backward", "slope"), *(("mil_align_loss_backward", x) for x in ("slope", "alpha_slope"))}


def arguments_of(name: str) -> dict:
    """The call by the schema's names."""
    names = [argument.name for argument in getattr(OPS, name).default._schema.arguments]
    return dict(zip(names, calls()[name], strict=True))


def call(name: str, arguments: dict) -> tuple[Tensor, ...]:
    out = getattr(OPS, name)(*arguments.values())
    return out if isinstance(out, tuple) else (out,)


def changes(name: str, tensors: bool):
    """(name of an argument, its value, all arguments) of a call that fits."""
    arguments = arguments_of(name)
    for key, value in arguments.items():
        if isinstance(value, Tensor) == tensors:
            yield key, value, arguments


def refuses(name: str, arguments: dict, words: str = "must") -> None:
    with pytest.raises(RuntimeError, match=words):
        call(name, arguments)


@pytest.mark.skipif(not CSRC.is_dir(), reason="the sources are not here")
def test_every_operator_is_here():
    sources = "".join(path.read_text() for path in CSRC.glob("*_cpu.cpp"))
    tiles = set() if HAS_AVX512 else {name for name in re.findall(r'm\.impl\("(\w+)"', sources) if "_tiles" in name}
    assert {*NAMES, "has_amx", "has_avx512"} == set(re.findall(r'm\.impl\("(\w+)"', sources)) - tiles
    assert all(out.isfinite().all() for name in NAMES for out in call(name, arguments_of(name)))


@pytest.mark.parametrize("name", NAMES)
class TestRefusals:
    def test_ranks(self, name):
        for key, x, arguments in changes(name, True):
            if (name, key) in ANY_RANK:
                continue
            for bad in (x[None], *([x[0]] if x.ndim else [])):
                refuses(name, {**arguments, key: bad}, rf"must have shape \[.*, got {re.escape(str(list(bad.shape)))}")

    def test_sizes(self, name):
        for key, x, arguments in changes(name, True):
            for dim in range(x.ndim):
                for bad in (torch.cat([x, x.narrow(dim, 0, 1)], dim), x.narrow(dim, 0, 0)):
                    if (name, key, dim) not in FREE:
                        refuses(name, {**arguments, key: bad})
                    elif bad.numel():
                        call(name, {**arguments, key: bad})

    def test_dtypes(self, name):
        for key, x, arguments in changes(name, True):
            if x.is_floating_point() and name in ("pack_rows", "unpack_rows"):
                continue  # they move bytes
            wrong = (
                (torch.int16, torch.complex64, torch.float64)
                if x.is_floating_point()
                else {torch.float32, torch.int16, torch.bool} - {x.dtype}
            )
            alone = sum(isinstance(v, Tensor) and v.is_floating_point() for v in arguments.values()) == 1
            for dtype in wrong:
                if dtype != torch.float64 or not alone:
                    refuses(name, {**arguments, key: x.to(dtype)})
            if x.is_floating_point():
                refuses(
                    name,
                    {
                        k: v.half() if isinstance(v, Tensor) and v.is_floating_point() else v
                        for k, v in arguments.items()
                    },
                )

    @pytest.mark.parametrize("bad", [0, -1, T + N, 2**31, 2**40, -(2**63)])
    def test_lengths(self, name, bad):
        arguments = arguments_of(name)
        if "lengths" not in arguments:
            pytest.skip("takes no lengths")
        for dtype in (torch.int64, *([torch.int32] if abs(bad) < 2**31 else [])):
            lengths = torch.tensor([LENGTHS[0], bad, LENGTHS[2]], dtype=dtype)
            refuses(name, {**arguments, "lengths": lengths}, rf"lengths must lie in 1\.\.\d+, got {bad}")

    def test_numbers(self, name):
        for key, _, arguments in changes(name, False):
            if key in ("threshold", "causal", "dot", "save_y", "gain", "high"):
                continue  # any will do
            bad = {
                "scale": (0.0, -1.0, math.nan),
                "divisor": (0, -1),
                "rows": (0, -1),
                "total": (0, -1, N - 1, N + 1),
                "dilation": (0, -1),
                "activation": ("", "gelu"),
                "needs": ([], [True] * 3, [True] * 5),
                "amx": () if HAS_AMX else (True,),
            }
            for value in bad[key]:
                refuses(name, {**arguments, key: value}, "no tile units" if key == "amx" else "must")


@pytest.mark.skipif(not HAS_AVX512, reason="needs a processor with AVX-512")
def test_a_layer_with_a_dot_and_one_without():
    """The calls above are of the other kind."""
    arguments = arguments_of("linear_act_tiles") | {"residual": None, "mask": None, "dot": torch.randn(C)}
    y, name = torch.randn(B, T, C), "linear_act_tiles"
    call(name, arguments)
    refuses(name, {**arguments, "dot": torch.randn(C + 1)}, rf"dot must have shape \[{C}\], got \[{C + 1}\]")
    for other, value in (("residual", y), ("mask", y > 0)):
        refuses(name, {**arguments, other: value}, "residual and mask must be none where dot is given")
    name = "linear_act_tiles_backward"
    refuses(name, {**arguments_of(name), "activation": "none", "kept": y[:0]}, "kept must have shape")
    arguments = arguments_of(name) | {"grad": y, "dot": None, "needs": [True] * 3 + [False]}
    for activation in ("relu", "quick_gelu"):
        arguments["activation"] = activation
        call(name, arguments)
        refuses(name, {**arguments, "kept": y[:0]}, rf"kept must have shape \[{B}, {T}, {C}\], got \[0, {T}, {C}\]")
    for bad in (y[..., 0], y[..., :1]):
        refuses(name, {**arguments, "grad": bad}, rf"grad must have shape \[{B}, {T}, {C}\], got \[{B}, {T}")
    refuses(name, {**arguments, "needs": [True] * 4}, "needs must not have dot's flag where there is none")


def test_indices_outside():
    arguments = arguments_of("topk_mean_backward")
    index = arguments["index"].clone()
    index[1, 1, 0] = T
    refuses("topk_mean_backward", {**arguments, "index": index}, f"index must be below {T}")
    index[1, 1] = torch.tensor([-(2**31), 3, 3, T - 1, 0])  # none: the list ends at the first below zero
    (slope,) = call("topk_mean_backward", {**arguments, "index": index})
    assert (slope[1, :, 1] == 0).all() and slope[1, 5, 0] == arguments["grad"][1, 0]


@pytest.mark.parametrize("name", NAMES)
class TestServes:
    def test_any_layout(self, name):
        expected = call(name, arguments_of(name))
        for key, x, arguments in changes(name, True):
            turned = x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x
            strided = torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
            shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)  # starts where no 16 bytes do
            for same in (turned, strided, shifted):
                got = call(name, {**arguments, key: same})
                if name.startswith("similarity_") and same is shifted:
                    # Its products are torch's, whose order of summation may depend on where a row starts.
                    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
                else:
                    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), key

    def test_lengths_of_32_bits(self, name):
        arguments = arguments_of(name)
        short = {k: v.int() if k == "lengths" else v for k, v in arguments.items()}
        column = {k: torch.stack([v, 0 * v], 1)[:, 0] if k == "lengths" else v for k, v in short.items()}
        for same in (short, column):
            assert all(torch.equal(a, b) for a, b in zip(call(name, same), call(name, arguments), strict=True))

    def test_no_video_and_no_width(self, name):
        """Sizes of zero, wherever the arguments agree on them."""

        def emptied(value: object, *sizes: int) -> object:
            if not isinstance(value, Tensor):
                return 0 if value in sizes and value == N else value
            return value[tuple(slice(0 if size in sizes else None) for size in value.shape)]

        for sizes in ((B, N), (D,), (C,)):
            arguments = {key: emptied(value, *sizes) for key, value in arguments_of(name).items()}
            if sizes == (C,) and name in ("mil_loss", "mil_align_loss"):
                refuses(name, arguments, "must have a class")
            else:
                call(name, arguments)

    def test_threads_and_reruns_change_no_bit(self, name):
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 2, 1):
                torch.set_num_threads(threads)
                results.append(call(name, arguments_of(name)))
        finally:
            torch.set_num_threads(before)
        for again in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


def test_work_in_many_parts_is_the_same_in_any_number_of_threads():
    """The sizes above are too small to be parted: one thread takes all."""
    torch.manual_seed(0)
    x, lengths, labels = torch.randn(3, 260, 300), torch.tensor([260, 3, 100]), torch.rand(3, 300) + 0.1
    before = torch.get_num_threads()
    layers = (  # whose weights and biases are numbers of x too
        lambda x: ops.linear_act(x, x[:, :100].permute(1, 2, 0), x[0, 0, :100], lengths=lengths, backend="cpp"),
        lambda x: ops.linear_act(x[0], x[1, :70], x[2, 0, :70], "relu", backend="cpp"),
    )
    functions = (
        lambda x: ops.topk_mean(x, lengths, backend="cpp"),
        lambda x: ops.mil_align_loss(x, labels, lengths, torch.ones(300), backend="cpp") * 3,
        lambda x: ops.distance_graph(x, math.e, lengths, backend="cpp"),
        lambda x: ops.distance_graph(x, 40.0, lengths, backend="cpp"),
        lambda x: ops.uniform_pool(x.flatten(0, 1), torch.tensor([500, 7, 273]), 40, backend="cpp"),
        lambda x: ops.mil_loss(x[0].T, labels[:1].T - 0.1, torch.arange(1, 301) % 260 + 1, backend="cpp"),
        *(layers if HAS_AVX512 else ()),
    )
    try:
        for number, function in enumerate(functions):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                given = x.clone().requires_grad_()
                out = function(given)
                results.append((out, *torch.autograd.grad(out.square().sum(), given)))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True)), number
    finally:
        torch.set_num_threads(before)


# Multiples of an eighth: what differs, differs by more than a rounding of the sigmoid, so that ties are the same ones.
LATTICE = st.integers(-32, 32).map(lambda n: n / 8)
FEW = st.sampled_from([0.0, -0.0, 1.0])
CORNERS = st.sampled_from([math.nan, math.inf, -math.inf])


@st.composite
def videos(draw, width: int):
    """x (2, T, width) with ties and with numbers that are not finite, lengths, and a divisor: k = 1 to k = n."""
    rows = draw(st.integers(1, 24))
    value = st.one_of(LATTICE, FEW, *([CORNERS] if draw(st.booleans()) else []))
    count = 2 * rows * width
    x = torch.tensor(draw(st.lists(value, min_size=count, max_size=count))).view(2, rows, width)
    lengths = torch.tensor(draw(st.lists(st.integers(1, rows), min_size=2, max_size=2)))
    x[torch.arange(rows) >= lengths[:, None]] = 0  # that padding has no effect is tested for all ops
    return x, lengths, draw(st.sampled_from([1, 2, 3, 16, 1000]))


def outcome(function, backend: str, *inputs: Tensor) -> list[Tensor]:
    """The result and the gradients of its sum."""
    given = [x.clone().requires_grad_() for x in inputs]
    out = function(*given, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.sum(), given)]


def assert_alike(function, *inputs: Tensor) -> None:
    for got, expected in zip(outcome(function, "cpp", *inputs), outcome(function, "reference", *inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


class TestNumbers:
    """Every finite and every other number is the reference's, of results and of gradients."""

    @settings(deadline=None, max_examples=80)
    @given(videos(3))
    def test_topk_mean(self, given):
        x, lengths, divisor = given
        assert_alike(lambda x, backend: ops.topk_mean(x, lengths, divisor, backend), x)

    @settings(deadline=None, max_examples=80)
    @given(videos(1), st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4))
    def test_mil_loss(self, given, labels):
        (x, lengths, divisor), labels = given, torch.tensor(labels).view(2, 2)
        assert_alike(lambda x, backend: ops.mil_loss(x, labels, lengths, divisor, backend), x[..., 0])

    @settings(deadline=None, max_examples=80)
    @given(videos(3), st.lists(st.sampled_from([0.0, 1.0]), min_size=6, max_size=6))
    def test_mil_align_loss(self, given, labels):
        """A row of labels without a class is no loss that means anything: NaN, as in the reference."""
        (x, lengths, divisor), labels = given, torch.tensor(labels).view(2, 3)
        alpha = torch.tensor([0.25, 0.5, 1.0])
        assert_alike(lambda x, a, backend: ops.mil_align_loss(x, labels, lengths, a, divisor, backend), x, alpha)

    @settings(deadline=None, max_examples=80)
    @given(videos(2), st.sampled_from([0.5, math.e, 40.0]))
    def test_distance_graph(self, given, scale):
        x, lengths, _ = given
        assert_alike(lambda x, backend: ops.distance_graph(x, scale, lengths, backend), x)


def test_no_class_at_all_is_not_a_number():
    logits, alpha = torch.randn(2, 4, 3), torch.rand(3)
    labels, lengths = torch.tensor([[0.0, 1, 0], [0, 0, 0]]), torch.tensor([4, 4])

    def loss(x, a, backend):
        return ops.mil_align_loss(x, labels, lengths, a, backend=backend)

    assert_alike(loss, logits, alpha)
    out, slope, _ = outcome(loss, "cpp", logits, alpha)
    assert out.isnan() and slope[0].isfinite().all() and slope[1].isnan().any()


def test_an_infinity_reaches_the_whole_video():
    """Where the reference's weight has underflowed to 0, and 0 · inf is NaN, a scan still has the infinity."""
    for at in (0, 699):
        values = torch.ones(1, 700, 2)
        values[0, at, 1] = math.inf
        scan, product = (ops.distance_graph(values, math.e, backend=name)[0] for name in ("cpp", "reference"))
        assert scan[:, 0].isfinite().all() and (scan[:, 1] == math.inf).all()
        near = (torch.arange(700) - at).abs() < 200  # exp(-200 / e) is 1e-32, exp(-399 / e) underflows
        assert (product[near, 1] == math.inf).all() and product[699 - at, 1].isnan()
        assert not product[:, 1].isfinite().any()


def test_gradients_of_pooling_and_packing_in_float64():
    torch.manual_seed(0)
    packed, padded = torch.randn(N, 2, dtype=torch.double), torch.randn(B, T, 2, dtype=torch.double)
    lengths = torch.tensor(LENGTHS)
    for function, x in (
        (lambda x: OPS.uniform_pool(x, lengths, 4), packed),
        (lambda x: OPS.uniform_pool(x, lengths, 9), packed),
        (lambda x: OPS.pack_rows(x, lengths, N), padded),
        (lambda x: OPS.unpack_rows(x, lengths, T), packed),
    ):
        assert torch.autograd.gradcheck(function, x.requires_grad_())


def test_gradients_of_what_is_linear_have_their_own():
    torch.manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    index = OPS.topk_mean(torch.randn(B, T, C), lengths, 2)[1]
    for function, grad in (
        (lambda g: OPS.uniform_pool_backward(g, lengths, N), torch.randn(B, 4, 2)),
        (lambda g: OPS.topk_mean_backward(g, index, T), torch.randn(B, C)),
    ):
        grad = grad.double().requires_grad_()
        assert torch.autograd.gradcheck(function, grad) and torch.autograd.gradgradcheck(function, grad)


@on_both_units
@pytest.mark.parametrize("inputs, outputs, rows", [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_a_layer_without_inputs_outputs_or_rows(inputs, outputs, rows, backend):
    x, weight = torch.randn(2, rows, inputs), torch.randn(outputs, inputs)
    for bias, residual in ((None, None), (torch.randn(outputs), torch.randn(2, rows, outputs))):
        layer = {"x": x, "weight": weight, "bias": bias, "residual": residual}
        results = []
        for name in ("reference", backend):
            leaf = convert(layer, lambda _, x: x.clone().requires_grad_())
            out = ops.linear_act(**leaf, backend=name)
            results.append([out, *torch.autograd.grad(out.square().sum(), [x for _, x in leaves(leaf)])])
        torch.testing.assert_close(*results)
