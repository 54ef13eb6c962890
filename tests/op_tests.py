"""What holds for every op and every backend in the dispatch table; each tests/test_X.py inherits it for op X.

A backend is tested on the devices it can run on, as soon as it has a row in the table.
"""

import re
import sys
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cases import CASES, FIXED, LARGE, ROWS, Case, convert, leaves, time_last
from tolerance import assert_within_rule
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from avadclip_fast import BackendError, ops
from avadclip_fast.ops import _dispatch
from avadclip_fast.ops._linear_act_cpu import HAS_AMX, HAS_AVX512
from avadclip_fast.ops._triton import INTERPRETED

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = {
    "reference": ("cpu", "cuda"),
    "cpp": ("cpu",),
    "amx": ("cpu",),
    "onednn": ("cpu",),
    "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",),
    "cuda": ("cuda",),
}
VANISHES = 1e-14  # a gradient this small in float64, of summands of about 1, is zero
ON_CHIP = ("triton", "cuda")  # backend and device where Triton compiles; its interpreter rounds every operation
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
ON_TILES = pytest.mark.skipif(not HAS_AMX, reason="needs a processor with tile units (AMX)")
ON_AVX512 = pytest.mark.skipif(not HAS_AVX512, reason="needs a processor with AVX-512")
on_both_units = pytest.mark.parametrize(  # what computes the products of linear_act on a processor
    "backend", [pytest.param("amx", marks=ON_TILES), pytest.param("cpp", marks=ON_AVX512)]
)


def _name(value: Any) -> str:
    return value.name if isinstance(value, Case) else str(value).removeprefix("torch.")


def _parameter(*values: Any, device: str) -> Any:
    marks = ON_GPU if device == "cuda" else ON_TILES if "amx" in values else ()
    return pytest.param(*values, device, marks=marks, id="-".join(map(_name, values)))


class Recorder(TorchDispatchMode):
    """Notes every call of an operator of ours, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "avadclip_fast":
            copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
            self.calls.setdefault(str(function), (function, copies, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def check(self, **which: str) -> None:
        """Holds what the operators say of their results to what those are. which: of opcheck's tests, all by default"""
        for function, args, kwargs in self.calls.values():
            differentiable = not function._schema.name.endswith("_backward")
            args = [
                x.requires_grad_() if differentiable and isinstance(x, Tensor) and x.is_floating_point() else x
                for x in args
            ]
            torch.library.opcheck(function, tuple(args), kwargs, **which)


class OpTests:
    """Inherit as `class TestX(OpTests)`, and say what the op is by these attributes."""

    op: str  # its name in ops, in the table and in cases
    ragged = "ragged"  # a case with lengths, for whatever needs one case only
    single: ClassVar[dict[str, str]] = {}  # the same for a backend that cannot serve that one
    per_row = False  # the result has a row per snippet; those of padding mean nothing
    made_of: str | None = None  # the op whose products make it up where it has no kernel of its own
    packed = False  # rows come packed, so that there is no padding
    lowered = False  # autocast makes its products bf16
    free: ClassVar[set[tuple[str, int]]] = set()  # (argument, dimension) that agrees with no other argument's
    loose: ClassVar[tuple[str, ...]] = ()  # arguments of any dtype
    spreads: ClassVar[tuple[str, ...]] = ()  # arguments whose NaN may reach more rows of its video than it must
    kinked: ClassVar[tuple[str, ...]] = ()  # cases that sit on a discontinuity of the gradient

    def oracle(self, **arguments: Any) -> np.ndarray:
        """The op as loops over numbers, written from the equation alone, in float64 on numpy arrays."""
        raise NotImplementedError

    def call(self, arguments: dict[str, Any], backend: str | None) -> Tensor:
        return getattr(ops, self.op)(**arguments, backend=backend)

    def unsure(self, arguments: dict[str, Any]) -> Tensor | None:
        """True for the rows of the result that a rounding may change by a jump; None: there are none."""
        return None

    # What the tests are run on

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        names = [name for name in ("case", "backend", "dtype", "device") if name in metafunc.fixturenames]
        if not names:
            return
        small = CASES[cls.op]
        by_name = {case.name: case for case in small}
        rows = []
        if "backend" not in names:
            rows = [pytest.param(case, id=case.name) for case in small]
        gpu = torch.cuda.is_available() or "gpu" in metafunc.config.option.markexpr  # asked for in vain: skipped aloud
        for backend in _dispatch.TABLE[cls.op] if "backend" in names else ():
            for device in DEVICES[backend]:
                if device == "cuda" and not gpu:
                    continue
                if "dtype" not in names:
                    rows.append(_parameter(by_name[cls.single.get(backend, cls.ragged)], backend, device=device))
                    continue
                for case in small + (LARGE[cls.op] if device == "cuda" else []):
                    for dtype in DTYPES:
                        if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
                            continue  # Triton's interpreter multiplies the bit patterns of bfloat16
                        rows.append(_parameter(case, backend, dtype, device=device))
        metafunc.parametrize(names, rows)

    def make(self, case: Case, backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
        """The case's arguments; skips where the backend says that it cannot serve them."""
        arguments = case.make(dtype, device, 0)
        try:
            self.call(arguments, backend)
        except BackendError as error:
            pytest.skip(str(error))
        return arguments

    def run(
        self, arguments: dict[str, Any], backend: str | None, upstream: Tensor | None = None, also: tuple[str, ...] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The result, and the gradients of <result, upstream> by argument; `also`: those of FIXED arguments too."""
        without = set(FIXED.get(self.op, ())) - set(also)
        arguments = convert(arguments, lambda name, x: x.detach().requires_grad_(name not in without))
        wanted = {name: x for name, x in leaves(arguments) if x.requires_grad}
        out = self.call(arguments, backend)
        upstream = draw_like(out) if upstream is None else upstream.to(out.dtype)
        grads = torch.autograd.grad(out, list(wanted.values()), upstream, materialize_grads=True)
        return out.detach(), dict(zip(wanted, grads, strict=True))

    # The reference is right

    def test_reference_equals_loops(self, case: Case):
        arguments = convert(case.make(torch.float64, "cpu", 0), lambda _, x: x.double())

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(plain, value))
            return value.numpy() if isinstance(value, Tensor) else value

        numbers = {name: plain(value) for name, value in arguments.items()}
        expected = torch.as_tensor(self.oracle(**numbers), dtype=torch.float64)
        # 1e-12: a few thousand roundings of 1e-16 in another order
        torch.testing.assert_close(self.call(arguments, "reference"), expected, rtol=1e-12, atol=1e-12)

    def test_reference_gradients(self, case: Case):
        if case.name in self.kinked:
            pytest.skip("not differentiable there")
        arguments = convert(case.make(torch.float64, "cpu", 0), lambda _, x: x.double())
        unsure = self.unsure(arguments)
        names, tensors = zip(*leaves(arguments), strict=True)

        def function(*values: Tensor) -> Tensor:
            given = dict(zip(names, values, strict=True))
            out = self.call(convert(arguments, lambda name, _: given[name]), "reference")
            return out if unsure is None else out[~unsure]

        inputs = [x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in tensors]
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)

    # Every backend agrees with it

    def test_backend_agrees(self, case: Case, backend: str, dtype: torch.dtype, device: str):
        self.agree(self.make(case, backend, dtype, device), backend)

    def agree(self, arguments: dict[str, Any], backend: str, also: tuple[str, ...] = ()) -> None:
        exact = convert(arguments, lambda _, x: x.double())
        upstream = draw_like(self.call(arguments, backend))
        unsure = self.unsure(exact)
        if unsure is not None:
            assert unsure.double().mean() < 0.25, "too many rows lie at the discontinuity to test anything"
            upstream[unsure] = 0  # such a row then has no part in any gradient
        padding = self.padding(arguments, "needed")
        if padding is not None:
            upstream[padding] = 0
        out, grads = self.run(arguments, backend, upstream, also)
        reference, reference_grads = self.run(arguments, "reference", upstream, also)
        oracle, oracle_grads = self.run(exact, "reference", upstream, also)
        if unsure is not None:
            out, reference, oracle = (x[~unsure] for x in (out, reference, oracle))
        if padding is not None:
            out, reference, oracle = (x[~padding] for x in (out, reference, oracle))
        if backend == "reference":
            self.accurate(out, oracle)
        assert_within_rule(self.op, out, reference, oracle)
        for name, grad in grads.items():
            if oracle_grads[name].numel() and oracle_grads[name].abs().max() < VANISHES:
                # Zero by cancellation: what is left are roundings of summands of about 1, by luck more or fewer.
                assert grad.abs().max() <= 8 * torch.finfo(grad.dtype).eps, f"gradient of {name} is zero, not {grad}"
                continue
            reduced = name not in ROWS[self.op]
            assert_within_rule(f"gradient of {name}", grad, reference_grads[name], oracle_grads[name], reduced)

    def accurate(self, out: Tensor, oracle: Tensor) -> None:
        """The reference itself must deserve its part in the rule: 32 roundings, of inputs, products and sums."""
        allowed = 32 * torch.finfo(out.dtype).eps * max(1.0, oracle.abs().max().item())
        assert (out.double() - oracle).abs().max() <= allowed

    def test_fixed_arguments(self, case: Case, backend: str, device: str):
        """A backend either makes the gradient of an argument that seldom needs one, or declines the call."""
        fixed = [name for name in FIXED.get(self.op, ()) if name in dict(leaves(case.make(torch.float32, device, 0)))]
        if not fixed:
            pytest.skip("every argument's gradient is tested already")
        arguments = self.make(case, backend, device=device)
        try:
            self.agree(arguments, backend, also=tuple(fixed))
        except BackendError as error:
            assert "gradient" in str(error)

    def test_runs_alike(self, case: Case, backend: str, device: str):
        """Run twice; with int32 lengths: the same bits. Under inference mode; each gradient wanted alone: the same."""
        arguments = self.make(case, backend, device=device)
        out, grads = self.run(arguments, backend)
        again, grads_again = self.run(arguments, backend)
        assert torch.equal(out, again)
        assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
        with torch.inference_mode():
            inferred = self.call(arguments, backend)
        # Where nothing is kept for a backward pass, Triton compiles another kernel, in which the last product and sum
        # may be two instructions and not one: a rounding more, of the product and so of the sum.
        rounded = 2 * torch.finfo(out.dtype).eps * out.abs().max().item() if (backend, device) == ON_CHIP else 0
        torch.testing.assert_close(inferred, out, rtol=0, atol=rounded)
        if arguments.get("lengths") is not None:
            short = {**arguments, "lengths": arguments["lengths"].int()}
            assert torch.equal(out, self.run(short, backend)[0])
        for name in grads:
            alone = convert(arguments, lambda n, x, name=name: x.detach().requires_grad_(n == name))
            result = self.call(alone, backend)
            (grad,) = torch.autograd.grad(result, [dict(leaves(alone))[name]], draw_like(result))
            torch.testing.assert_close(grad, grads[name], rtol=1e-5, atol=1e-6)  # another kernel may serve a subset

    def test_upstream_of_any_layout(self, case: Case, backend: str, device: str):
        arguments = self.make(case, backend, device=device)
        out, expected = self.run(arguments, backend, torch.ones_like(self.call(arguments, backend)).contiguous())
        expanded = torch.ones((), device=out.device).expand(out.shape)  # what sum().backward() hands down
        transposed = torch.ones(out.shape[::-1], device=out.device).permute(tuple(reversed(range(out.ndim))))
        for upstream in (expanded, transposed):
            for name, grad in self.run(arguments, backend, upstream)[1].items():
                torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)

    def test_a_result_can_be_written_to(self, case: Case, backend: str, device: str):
        """As in `y = layer(x); y += position`: torch refuses it of a view that an operator's own code has made."""
        arguments = self.make(case, backend, device=device)
        without = FIXED.get(self.op, ())
        self.call(convert(arguments, lambda name, x: x.requires_grad_(name not in without)), backend).mul_(2)

    def test_a_result_that_gets_no_gradient_hands_none_down(self, case: Case, backend: str, device: str):
        without = FIXED.get(self.op, ())
        arguments = convert(
            self.make(case, backend, device=device), lambda name, x: x.requires_grad_(name not in without)
        )
        wanted = [x for _, x in leaves(arguments) if x.requires_grad]
        out = Cut.apply(self.call(arguments, backend)).sum()
        assert not any(x.any() for x in torch.autograd.grad(out, wanted, materialize_grads=True))

    def test_vectors_of_any_stride(self, case: Case, backend: str, device: str):
        """Lengths, biases and other vectors may be columns of a matrix."""
        arguments = self.make(case, backend, device=device)

        def column(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(column, x))
            return torch.stack([x, -x], dim=1)[:, 0] if isinstance(x, Tensor) and x.ndim == 1 else x

        strided = {name: column(value) for name, value in arguments.items()}
        (out, grads), (other, other_grads) = self.run(arguments, backend), self.run(strided, backend)
        # cuBLAS takes another kernel where a bias has a stride; ours read the same numbers in the same order.
        alike = {"rtol": 1e-5, "atol": 1e-6} if (backend, device) == ("reference", "cuda") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(other, out, **alike, equal_nan=True)
        for name, grad in grads.items():
            torch.testing.assert_close(other_grads[name], grad, **alike)

    @pytest.mark.parametrize("garbage", [1e4, float("inf"), float("nan")])
    def test_padding_has_no_effect(self, case: Case, backend: str, device: str, garbage: float):
        arguments = self.make(case, backend, device=device)
        padding = self.padding(arguments, "lengths")
        if padding is None or self.packed:
            pytest.skip("no padding here")
        assert padding.any()

        def spoil(name: str, x: Tensor) -> Tensor:
            x = x.clone()
            if name in ROWS[self.op]:
                x[padding] = garbage
            return x

        upstream = draw_like(self.call(arguments, backend))
        if self.per_row:
            upstream[padding] = 0
        out, grads = self.run(arguments, backend, upstream)
        spoilt, spoilt_grads = self.run(convert(arguments, spoil), backend, upstream)
        if self.per_row:
            out, spoilt = out[~padding], spoilt[~padding]
        torch.testing.assert_close(spoilt, out, rtol=1e-6, atol=1e-6)
        for name, grad in grads.items():
            other = spoilt_grads[name]
            if name in ROWS[self.op]:
                grad, other = grad[~padding], other[~padding]
            torch.testing.assert_close(other, grad, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"gradient of {n}: {m}")

    @pytest.mark.filterwarnings("error::UserWarning")  # torch's, of a derivative that is not there
    def test_second_derivatives_are_right_or_refused(self, case: Case, backend: str, device: str):
        """Of a function of the result and of the arguments: a term is there even where the op's own would be lost."""
        arguments = self.make(case, backend, device=device)
        without = FIXED.get(self.op, ())

        def second(arguments: dict[str, Any], backend: str) -> list[Tensor]:
            given = convert(arguments, lambda name, x: x.detach().clone().requires_grad_(name not in without))
            wanted = [x for _, x in leaves(given) if x.requires_grad]
            loss = self.call(given, backend).square().sum() + sum(x.square().sum() for x in wanted)
            grads = torch.autograd.grad(loss, wanted, create_graph=True)
            return list(torch.autograd.grad(sum((g * draw_like(g)).sum() for g in grads), wanted))

        oracle = second(convert(arguments, lambda _, x: x.double()), "reference")
        try:
            found = second(arguments, backend)
        except BackendError as error:
            remedy = "run the forward pass in use_backend('reference')"  # which serves models too
            assert str(error) in {f"{op} is not differentiable twice here; {remedy}" for op in (self.op, self.made_of)}
            return
        for x, exact in zip(found, oracle, strict=True):
            torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=1e-4 * max(1.0, exact.abs().max().item()))

    def test_a_length_past_the_rows_is_that_of_all(self, case: Case, backend: str, device: str, monkeypatch):
        """A GPU's lengths are not looked at before a kernel has them: it must not read on into the next video."""
        arguments = self.make(case, backend, device=device)
        lengths = arguments.get("lengths")
        if backend not in ("triton", "cuda") or lengths is None or self.packed:
            pytest.skip("lengths are looked at, or there are none")
        module = sys.modules[getattr(ops, self.op).__module__]
        monkeypatch.setattr(module, "check_lengths", lambda *_, **__: None)
        rows = arguments[ROWS[self.op][0]].shape[1]
        whole, past = (torch.cat([lengths.new_tensor([n]), lengths[1:]]) for n in (rows, rows + 3))
        if self.op == "pack_rows":
            arguments["total"] = int(whole.sum())
        results = [self.run({**arguments, "lengths": given}, backend) for given in (whole, past)]
        (whole, grads), (past, others) = results
        assert torch.equal(past, whole) and all(torch.equal(others[name], grad) for name, grad in grads.items())

    def test_not_a_number_propagates(self, case: Case, backend: str, device: str):
        """What a NaN in a valid row reaches is what it reaches in the reference."""
        arguments = self.make(case, backend, device=device)
        padding = self.padding(arguments, "needed")
        for changed, x in leaves(arguments):
            poisoned = x.clone()
            poisoned.view(-1)[0] = float("nan")
            bad = convert(arguments, lambda n, x, c=changed, p=poisoned: p if n == c else x)
            got, expected = self.call(bad, backend), self.call(bad, "reference")
            got, expected = (x if padding is None else x[~padding] for x in (got, expected))
            if changed in self.spreads:
                assert not (expected.isnan() & ~got.isnan()).any() and not got[1:].isnan().any(), changed
            else:
                assert torch.equal(got.isnan(), expected.isnan()), changed

    def test_empty_batch(self, case: Case, backend: str, device: str):
        """No video: an empty result of the right shape, no crash. (A mean over nothing is NaN.)"""
        arguments = self.make(case, backend, device=device)
        if self.packed:
            pytest.skip("a packed batch is empty where the padded one is")
        full = self.call(arguments, backend)
        batched = {*ROWS[self.op], "prompts", "labels"}
        empty = convert(arguments, lambda name, x: x[:0] if name in batched else x)
        if empty.get("lengths") is not None:
            empty["lengths"] = empty["lengths"][:0]
        out, grads = self.run(empty, backend)
        assert out.shape[1:] == full.shape[1:] and out.dtype == full.dtype
        assert all(grads[name].shape == x.shape for name, x in leaves(empty) if name in grads)

    # It lives with torch

    def test_compiles(self, case: Case, backend: str, device: str):
        arguments = self.make(case, backend, device=device)
        out, grads = self.run(arguments, backend)
        torch._dynamo.reset()
        compiled = torch.compile(lambda given: self.call(given, backend), fullgraph=True, backend="aot_eager")
        given = convert(arguments, lambda name, x: x.detach().requires_grad_(name in grads))
        result = compiled(given)
        torch.testing.assert_close(result, out, rtol=1e-6, atol=1e-6)
        wanted = {name: x for name, x in leaves(given) if x.requires_grad}
        got = torch.autograd.grad(result, list(wanted.values()), draw_like(result))
        for name, grad in zip(wanted, got, strict=True):
            torch.testing.assert_close(grad, grads[name], rtol=1e-5, atol=1e-6)

    def test_operators_pass_opcheck(self, case: Case, backend: str, device: str):
        # In float16, what is kept in float32 has another dtype than the inputs; stored as (B, D, T), other strides.
        arguments = self.make(case, backend, torch.float16 if backend == "triton" else torch.float32, device)
        with Recorder() as recorder:
            self.run(convert(arguments, lambda _, x: time_last(x) if x.ndim == 3 else x), backend)
        if not recorder.calls:
            assert backend == "reference", f"{self.op}: {backend} calls no operator of torch.ops.avadclip_fast"
            pytest.skip("the reference is plain PyTorch")
        recorder.check()

    @pytest.mark.parametrize("halved", ["first", "all but the last"])  # none: in test_autocast, and in Triton's tests
    def test_two_dtypes_under_autocast(self, case: Case, backend: str, device: str, halved: str):
        """Some arguments in float16, as products leave them: the values, their dtype, and what a compiler is told."""
        if backend == "reference":
            pytest.skip("it is what others are compared with")
        arguments = self.make(case, backend, device=device)
        names = [name for name, _ in leaves(arguments)]
        low = names[:1] if halved == "first" else names[:-1]
        arguments = convert(arguments, lambda name, x: x.half() if name in low else x)

        def both_ways(backend: str) -> Tensor:
            given = convert(arguments, lambda name, x: x.detach().requires_grad_(name not in FIXED.get(self.op, ())))
            wanted = [x for _, x in leaves(given) if x.requires_grad]
            with torch.autocast(device, torch.float16):  # of the forward pass alone, as in training
                out = self.call(given, backend)
            torch.autograd.grad(out, wanted, draw_like(out))
            return out.detach()

        expected = both_ways("reference")
        try:
            with Recorder() as recorder:
                out = both_ways(backend)
        except BackendError as error:
            pytest.skip(str(error))
        recorder.check(test_utils="test_faketensor")  # the only one that dtypes matter to; all take a second each
        unsure = self.unsure(arguments)
        assert out.dtype == expected.dtype
        if unsure is None:
            # 2^-10 is a rounding of float16: a few of them, of the largest value
            torch.testing.assert_close(out, expected, rtol=0, atol=2**-8 * max(1.0, expected.abs().max().item()))

    @pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
    def test_autocast(self, case: Case, mixed: bool):
        """Under bf16 autocast: float32 inputs, and inputs of which the first is already bf16."""
        arguments = case.make(torch.float32, "cpu", 0)
        out, grads = self.run(arguments, None)
        first = next(leaves(arguments))[0]
        given = convert(arguments, lambda name, x: x.bfloat16() if mixed and name == first else x)
        given = convert(given, lambda name, x: x.detach().requires_grad_(name in grads))
        with torch.autocast("cpu", torch.bfloat16):
            result = self.call(given, None)
        wanted = {name: x for name, x in leaves(given) if x.requires_grad}
        got = torch.autograd.grad(result, list(wanted.values()), draw_like(out).to(result.dtype))
        assert result.isfinite().all()
        for name, grad in zip(wanted, got, strict=True):
            assert grad.dtype == wanted[name].dtype and grad.isfinite().all()
        if self.unsure(arguments) is None and case.name not in self.kinked:
            # 2^-8 is a rounding of bf16: a dozen of them, of the largest value
            roundings = 12 * 2**-8 if mixed or self.lowered else 1e-5
            assert (result.float() - out).abs().max() <= roundings * max(1.0, out.abs().max().item())

    def test_autocast_changes_no_reference(self):
        if self.lowered:
            pytest.skip("its products are bf16")
        arguments = self.one_case()
        out = self.call(arguments, "reference")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(self.call(arguments, "reference"), out)

    def test_a_gpus_autocast_changes_no_dtype_of_the_reference(self):
        """It makes every sum float32, which a CPU's does not."""
        if self.packed or self.op == "pack_rows":
            pytest.skip("how many rows there are is read from the lengths")

        def there(x: Tensor) -> Tensor:
            dtype = torch.float16 if x.is_floating_point() else x.dtype
            return torch.empty_strided(x.size(), x.stride(), dtype=dtype, device="cuda")

        arguments = self.one_case()
        with FakeTensorMode():  # in which a GPU is not needed
            arguments = tree_map_only(Tensor, there, arguments)
            plain = self.call(arguments, "reference").dtype
            torch.set_autocast_enabled("cuda", True)  # as torch.autocast does where there is a GPU
            try:
                assert self.call(arguments, "reference").dtype == plain
            finally:
                torch.set_autocast_enabled("cuda", False)

    # It refuses what does not fit

    def test_refuses_shapes(self):
        arguments = self.one_case()
        tensors = dict(leaves(arguments))
        for changed, x in tensors.items():
            grown = [(d, torch.cat([x, x.narrow(d, 0, 1)], d)) for d in range(x.ndim) if (changed, d) not in self.free]
            for dim, bad in [*grown, (None, x.unsqueeze(0))]:
                with pytest.raises(ValueError, match=rf"^{self.op}: .* must .*shape \[.*\].*got \[.*\]") as raised:
                    self.call(convert(arguments, lambda n, x, bad=bad, c=changed: bad if n == c else x), None)
                if dim is None and changed != "x":  # linear_act takes x of any rank: others then do not fit it
                    assert str(list(bad.shape)) in str(raised.value)
                    assert changed.split(".")[0] in str(raised.value)

    def test_refuses_dtypes(self):
        arguments = self.one_case()
        first = next(leaves(arguments))[0]
        for changed in set(dict(leaves(arguments))) - set(self.loose):
            with pytest.raises(ValueError, match=f"{self.op}: .*(floating point|is torch.float32).*int64"):
                self.call(convert(arguments, lambda n, x, c=changed: x.long() if n == c else x), None)
            if changed != first:
                with pytest.raises(ValueError, match=f"{changed.split('.')[0]}.* is torch.float64, but {first} is"):
                    self.call(convert(arguments, lambda n, x, c=changed: x.double() if n == c else x), None)

    def test_refuses_devices(self):
        arguments = self.one_case()
        names = list(dict(leaves(arguments)))
        for changed in names[1:] if len(names) > 1 else []:
            with pytest.raises(ValueError, match=f"{self.op}: {changed.split('.')[0]}.* on .*cpu.*meta|meta.*cpu"):
                self.call(convert(arguments, lambda n, x, c=changed: x.to("meta") if n == c else x), None)
        if arguments.get("lengths") is not None:
            with pytest.raises(ValueError, match="lengths is on meta, but .* on cpu"):
                self.call({**arguments, "lengths": arguments["lengths"].to("meta")}, None)

    def test_refuses_what_is_no_tensor(self):
        arguments = self.one_case()
        for name, x in arguments.items():
            if isinstance(x, Tensor):
                with pytest.raises(ValueError, match=f"{self.op}: {name} must be .*tensor.*got"):
                    self.call({**arguments, name: x.tolist()}, None)

    @pytest.mark.parametrize("bad", [0, -3, "a row too many"])
    def test_refuses_lengths(self, bad: int | str):
        arguments = self.one_case()
        if arguments.get("lengths") is None:
            pytest.skip("takes no lengths")
        if isinstance(bad, str):
            bad = 1 + arguments[ROWS[self.op][0]].shape[0 if self.packed else 1]
        lengths = arguments["lengths"].clone()
        lengths[-1] = bad
        with pytest.raises(ValueError, match=rf"{self.op}: lengths must .*{re.escape(str(bad))}"):
            self.call({**arguments, "lengths": lengths}, None)
        short = "sum to the number of rows" if self.packed else r"have shape \[\d\], got \[\d\]"
        for wrong, word in ((lengths.float(), "float32"), (arguments["lengths"][:-1], short)):
            with pytest.raises(ValueError, match=f"{self.op}: lengths must .*{word}"):
                self.call({**arguments, "lengths": wrong}, None)

    def test_refuses_numbers(self):
        """Sizes must be whole and above zero, scales above zero: the same words from every backend."""
        arguments = self.one_case()
        for name in set(arguments) & {"window", "heads", "divisor", "rows", "dilation", "scale", "temperature"}:
            for bad in (0, -1, None, "4", 2.5, True):
                if bad in (2.5, True) and name in ("scale", "temperature"):
                    continue
                with pytest.raises(ValueError, match=rf"{self.op}: {name} must be a .*number above zero, got .*{bad}"):
                    self.call({**arguments, name: bad}, None)

    def test_takes_numpys_numbers(self):
        arguments = self.one_case()
        given = {name: x for name, x in arguments.items() if type(x) in (int, float)}
        numpys = {name: np.float32(x) if isinstance(x, float) else np.int64(x) for name, x in given.items()}
        own = {name: x.item() for name, x in numpys.items()}
        assert torch.equal(self.call({**arguments, **numpys}, None), self.call({**arguments, **own}, None))

    def test_refuses_backends(self):
        arguments = self.one_case()
        with pytest.raises(BackendError, match=f"{self.op}: backend 'fpga' .*unknown backend"):
            self.call(arguments, "fpga")
        for backend in set(_dispatch.ORDER) - set(_dispatch.TABLE[self.op]):
            with pytest.raises(BackendError, match=f"{self.op}: backend {backend!r} .*not implemented"):
                self.call(arguments, backend)

    def padding(self, arguments: dict[str, Any], name: str) -> Tensor | None:
        """(B, T) True for rows from lengths, or those that are needed, on; None: there are none."""
        rows, lengths = arguments[ROWS[self.op][0]].shape[1], arguments.get(name)
        return None if lengths is None else torch.arange(rows, device=lengths.device) >= lengths[:, None]

    def one_case(self) -> dict[str, Any]:
        return next(case for case in CASES[self.op] if case.name == self.ragged).make(torch.float32, "cpu", 0)


class Cut(torch.autograd.Function):
    """Its input, which gets no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        return None


def draw_like(x: Tensor) -> Tensor:
    """Normal numbers of x's shape, dtype and device: the same ones at every call."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device, x.dtype)
