"""What Triton makes of every kernel for each architecture, without a GPU: registers, stack, shared memory, SASS.

    python -m bench.aot_triton            compiles, and writes the key "triton" of bench/aot_report.json
    python -m bench.aot_triton --check    compiles, and fails where a kernel is worse than the report or breaks a rule

Every launch of bench/triton_calls.py is compiled as its launcher makes it, with the committed configurations.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
import triton
from avadclip_fast.kernels import linear_act
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.triton_calls import calls

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "bench/aot_report.json"
MODULES = [import_module(f"avadclip_fast.kernels.{path.stem}") for path in sorted((ROOT / "kernels").glob("[!_]*.py"))]
CALLS = (ROOT / "bench/triton_calls.py", ROOT / "avadclip_fast/engine/tune.py")
SOURCES = (*sorted(path for path in (ROOT / "kernels").rglob("*.*") if path.suffix != ".pyc"), *CALLS)
CHIPS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148}  # multiprocessors
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes a block
GEMMS = (  # kernels that multiply matrices as large as a tile of the tensor cores
    "gemm_kernel", "weight_grad_kernel", "gates_kernel", "weights_kernel", "product_kernel", "window_kernel",
    "window_grad_kernel",
)  # fmt: skip
TENSOR_CORE = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
SAMPLE = (
    "mlp",
    "norm",
    "uncertainty, lengths",
    "fusion",
    "windows of 64",
    "class names",
    "graph",
    "prompts, lengths",
    "prompts of many classes",
    "distillation",
)  # the calls that are compiled in every dtype, not in bfloat16 alone
INSTRUCTIONS = (*dict.fromkeys(TENSOR_CORE.values()), "UTMALDG", "LDGSTS")
POINTERS = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8",
}  # fmt: skip


def source_hash() -> str:
    """Of all that decides what is compiled."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in SOURCES)).hexdigest()


class Launches:
    """Stands in for a kernel, and notes what it would be launched with."""

    def __init__(self, kernel: JITFunction, seen: list):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        def launch(*args, num_warps=4, num_stages=3, **named):
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | named
            self.seen.append((self.kernel, arguments, {"num_warps": num_warps, "num_stages": num_stages}))

        return launch


@contextlib.contextmanager
def recorded(chip: str) -> Iterator[list]:
    """Launches inside the block are noted as for `chip`, not made."""
    seen: list = []
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction) and name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name, Launches(value, seen)))
        stack.enter_context(mock.patch.object(linear_act, "_chip", lambda device: (chip, CHIPS[chip])))
        yield seen


def source(kernel: JITFunction, arguments: dict) -> ASTSource:
    """What Triton compiles for such arguments.

    It specialises on None, and where a kernel lets it on the integer 1 and on multiples of 16, pointers included.
    """
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        aligns = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        if isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + POINTERS[value.dtype]
            if aligns and value.data_ptr() % 16 == 0:  # on "meta" the offset from an allocation, which is aligned
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float) and not parameter.is_constexpr:
            signature[parameter.name] = "fp32"
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = "i32"
            if aligns and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def identity(kernel: JITFunction, arguments: dict, options: dict) -> tuple[str, ...]:
    """The same for launches that share what is compiled."""
    made = source(kernel, arguments)
    return kernel.__name__, str(made.signature), str(made.constants), str(made.attrs), str(options)


def resources(kernel: JITFunction, arguments: dict, options: dict, chip: str) -> dict[str, int]:
    """Compiles, and reads the binary: registers, stack, local and shared memory in bytes, instruction counts."""
    target = GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a default that Triton will change
        compiled = triton.compile(source(kernel, arguments), target=target, options=options)
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in INSTRUCTIONS}
    memory = {"registers": int(registers), "stack": int(stack), "local": int(local), "shared": compiled.metadata.shared}
    counts["overwritten"] = overwritten(compiled.asm["ttgir"])
    return memory | {name: count for name, count in counts.items() if count}


def overwritten(ttgir: str) -> int:
    """How many buffers a copy may write while products that were not waited for still read them.

    A loop copies some tiles ahead, the first ones before it starts. Where a product is still under way when the next
    is copied, its tile needs a slot besides theirs. Triton leaves it out if the tile is also read into registers.
    """
    if not re.search(r"warp_group_dot_wait .*pendings = [1-9]", ttgir):
        return 0
    slots, ahead, buffer, multiplied = {}, collections.Counter(), {}, set()
    for line in ttgir.splitlines():
        if made := re.search(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", line):
            slots[made[1]] = int(made[2])
        elif view := re.search(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)(\[%c\d)?", line):
            buffer[view[1]] = buffer.get(view[2], view[2])
            ahead[view[2]] += bool(view[3])
        elif product := re.search(r"warp_group_dot (%\w+), (%\w+)", line):
            multiplied |= {buffer.get(operand) for operand in product.groups()}
    return sum(slots[name] <= ahead[name] for name in multiplied & slots.keys())


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def variants(chip: str) -> dict[str, tuple[JITFunction, dict, dict]]:
    """name -> (kernel, arguments, options) of all launches that Triton would compile apart."""
    named, known = {}, set()
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
    for kind, dtype in kinds.items():
        with recorded(chip) as seen, tf32(kind == "tf32"):
            for call, run in calls(dtype, "meta"):
                if dtype != torch.bfloat16 and call not in SAMPLE:
                    continue
                start = len(seen)
                run()
                for place, launch in enumerate(seen[start:]):
                    if (key := identity(*launch)) not in known:
                        known.add(key)
                        named[f"{kind} {call} {place} {launch[0].__name__}"] = launch
    return named


def faults(chip: str, name: str, found: dict[str, int]) -> list[str]:
    """The rules: nothing in local memory, shared memory that fits and is not overwritten, tensor cores in products."""
    wrong = [f"{found[what]} bytes of {what}" for what in ("stack", "local") if found[what]]
    if "overwritten" in found:
        wrong.append(f"{found['overwritten']} buffers are overwritten while products read them")
    if found["shared"] > SHARED_LIMIT[chip]:
        wrong.append(f"{found['shared']} bytes of shared memory, the chip has {SHARED_LIMIT[chip]}")
    multiplies = name.endswith(GEMMS) and not name.startswith("float32")
    if multiplies and TENSOR_CORE[chip] not in found:
        wrong.append(f"no {TENSOR_CORE[chip]}")
    return [f"{chip} {name}: {what}" for what in wrong]


def worse(chip: str, name: str, found: dict[str, int], before: dict[str, int] | None) -> list[str]:
    """Against the report: more shared memory, more registers by more than an eighth, or TMA lost."""
    if before is None:
        return [f"{chip} {name}: not in the report; run python -m bench.aot_triton"]
    wrong = []
    if found["shared"] > before["shared"] or found["registers"] > before["registers"] * 9 // 8:
        wrong.append(f"{found} against {before}")
    if found.get("UTMALDG", 0) < before.get("UTMALDG", 0):
        wrong.append("fewer loads by TMA")
    return [f"{chip} {name}: {what}" for what in wrong]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.aot_triton")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--chip", choices=CHIPS, action="append")
    check, chips = parser.parse_args().check, parser.parse_args().chip or list(CHIPS)
    report = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    kept = report.get("triton", {}).get("kernels", {})
    kernels, wrong = {}, []
    for chip in chips:
        for name, launch in variants(chip).items():
            found = kernels.setdefault(name, {})[chip] = resources(*launch, chip)
            print(chip, name, found, flush=True)
            wrong += faults(chip, name, found)
            wrong += worse(chip, name, found, kept.get(name, {}).get(chip)) if check else []
    if not check:
        report["triton"] = {"sources": source_hash(), "triton": triton.__version__, "kernels": kernels}
        REPORT.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
