"""What setup.py promises by TORCH_TARGET: one source, and one build, from the oldest torch that is served on.

    python tests/abi_check.py [VERSION ...]     other torches than the one installed; without any, the oldest

Downloads a wheel of each VERSION, compiles every source of _C and _C_cuda against its headers, and checks that its
libraries export whatever the objects that are built here need of torch. Needs nvcc for the CUDA part.
"""

import re
import runpy
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from avadclip_fast import _build

ROOT = Path(__file__).parents[1]
BUILD = runpy.run_path(str(ROOT / "setup.py"))
LIBRARIES = ("libc10.so", "libtorch_cpu.so", "libc10_cuda.so", "libtorch_cuda.so")


def oldest() -> str:
    target = int(BUILD["TORCH_TARGET"], 16)
    return f"{target >> 56}.{target >> 48 & 255}"


def fetch(version: str, folder: Path) -> Path:
    """Headers and libraries of a torch, without what it depends on."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*download, f"torch=={version}.*"], check=True)
    with zipfile.ZipFile(next(folder.glob("torch-*.whl"))) as wheel:
        kept = [f"torch/lib/{name}" for name in LIBRARIES]
        names = [name for name in wheel.namelist() if name.startswith("torch/include/") or name in kept]
        wheel.extractall(folder, names)
    return folder / "torch"


def commands(torch: Path) -> list[list[str]]:
    """One compilation each, that writes nothing."""
    includes = [f"-I{torch}/include", "-Icsrc"]
    compilers = [(["c++", *BUILD["CPU_FLAGS"], "-fsyntax-only"], BUILD["CPU_SOURCES"])]
    if nvcc := BUILD["find_cuda"]():
        flags = [*BUILD["COMMON_FLAGS"], *BUILD["CUDA_FLAGS"], "-gencode=arch=compute_90,code=sm_90"]
        compilers.append(([f"{nvcc}/bin/nvcc", *flags, "-c", "-o", "/dev/null"], BUILD["CUDA_SOURCES"]))
    else:
        print("no nvcc: the CUDA part is left out")
    return [[*compiler, *includes, source] for compiler, sources in compilers for source in sources]


def symbols(library: Path, kind: str) -> set[str]:
    """Dynamic symbols, "defined" or "undefined" ones."""
    lines = subprocess.run(["nm", "-D", f"--{kind}-only", library], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"[A-TV-Z] (\S+)$" if kind == "defined" else r"U (\S+)$", lines, re.MULTILINE))


def check(version: str, here: Path) -> list[str]:
    """What does not hold for that torch. here: the torch that _C was built with."""
    with tempfile.TemporaryDirectory() as folder:
        torch = fetch(version, Path(folder))

        def compile_one(command: list[str]) -> str:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            return f"{command[-1]}, torch {version}: {done.stderr}" if done.returncode else ""

        with ThreadPoolExecutor() as pool:
            wrong = [error for error in pool.map(compile_one, commands(torch)) if error]
        exported = [
            {
                name
                for library in LIBRARIES
                if (at / "lib" / library).exists()
                for name in symbols(at / "lib" / library, "defined")
            }
            for at in (here, torch)
        ]
        for built in Path(_build.__file__).parent.glob("_C*.so"):
            needed = symbols(built, "undefined") & exported[0]
            absent = sorted(needed - exported[1])
            print(f"torch {version}: {built.name} needs {len(needed)} symbols of torch, {len(absent)} are not there")
            wrong += [f"{built.name}: torch {version} has no {name}" for name in absent]
            wrong += [] if needed else [f"{built.name} needs nothing of torch: it cannot be what it should"]
        return wrong


def main() -> None:
    here = BUILD["find_torch"]()
    wrong = [line for version in sys.argv[1:] or [oldest()] for line in check(version, here)]
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
