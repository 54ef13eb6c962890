"""What nvcc makes of csrc/*.cu for each architecture: registers, stack, spills and shared memory of every kernel.

    python -m bench.aot_cuda            compiles, and writes the key "cuda" of bench/aot_report.json
    python -m bench.aot_cuda --check    compiles, and fails where a kernel is worse than the report or has a stack

Needs nvcc and no GPU. tests/test_csrc.py checks that the report is that of the sources as they stand.
"""

import argparse
import hashlib
import json
import re
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "bench/aot_report.json"
ARCHS = ("80", "90", "100")
KERNEL = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


def source_hash() -> str:
    """Of all that nvcc reads from csrc."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("csrc/*.cu"), *ROOT.glob("csrc/*.cuh"), *ROOT.glob("csrc/stable*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compile_all() -> dict[str, dict[str, dict[str, int]]]:
    """kernel -> sm_NN -> registers, stack, spills, shared memory, in bytes."""
    build = runpy.run_path(str(ROOT / "setup.py"))
    nvcc, torch = build["find_cuda"](), build["find_torch"]()
    if nvcc is None:
        sys.exit("no nvcc: install a CUDA toolkit, or the extra `cuda-build`")
    flags = [*build["COMMON_FLAGS"], *build["CUDA_FLAGS"], *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS)]
    command = [f"{nvcc}/bin/nvcc", *flags, f"-I{torch}/include", "-Icsrc", "--resource-usage", "-c"]

    def usage(source: Path) -> str:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [*command, str(source), "-o", f"{folder}/out.o"], cwd=ROOT, capture_output=True, text=True
            )
        if done.returncode:
            sys.exit(done.stderr)
        return done.stdout + done.stderr

    with ThreadPoolExecutor() as pool:
        output = "".join(pool.map(usage, sorted(ROOT.glob("csrc/*.cu"))))
    names = subprocess.run(["c++filt"], input=output, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for match in KERNEL.finditer(
        re.sub(r"function '(?:void )?([^'\n]*)'", lambda m: f"function '{short(m[1])}'", names)
    ):
        name, arch, stack, stores, loads, registers, rest = match.groups()
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.setdefault(name, {})[f"sm_{arch}"] = {
            "registers": int(registers),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
            "shared": int(shared[1]) if shared else 0,
        }
    return kernels


def short(signature: str) -> str:
    """void avadclip::(anonymous namespace)::f<avadclip::bf16, 8>(...) -> f<bf16,8>"""
    name = re.sub(r"avadclip::|\(anonymous namespace\)::|_GLOBAL__N__\w+::|\((int|bool)\)", "", signature)
    return re.sub(r"\s", "", name.split("(")[0])


def worse(before: dict, after: dict) -> list[str]:
    """What got worse, or is not allowed at all."""
    found = []
    for name, archs in after.items():
        for arch, now in archs.items():
            was = before.get(name, {}).get(arch, now)
            if now["stack"] or now["spills"]:
                found.append(f"{name} {arch}: {now['stack']} bytes of stack, {now['spills']} of spills")
            if now["registers"] > was["registers"] or now["shared"] > was["shared"]:
                found.append(f"{name} {arch}: {now}, before {was}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    report = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    kernels = compile_all()
    found = worse(report.get("cuda", {}).get("kernels", {}), kernels)
    print(f"{len(kernels)} kernels, {', '.join(f'sm_{a}' for a in ARCHS)}")
    print("\n".join(found) or "none is worse, none has a stack or spills")
    if options.check:
        sys.exit(bool(found))
    report["cuda"] = {"kernels": kernels, "sources": source_hash()}
    REPORT.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
