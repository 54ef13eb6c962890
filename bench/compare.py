"""Checks whether a change makes an op slower: two versions of the library are timed in turns, in one run.

    python -m bench.compare main              the working tree against main
    python -m bench.compare v0.1 main         main against v0.1
    python -m bench.compare main --device cuda --op gated_fusion --op linear_act

A version is a git revision, which is checked out and built, or a folder with a built avadclip_fast. Both run the cases
of this tree, each in its own process; an op that the first version lacks is left out. A case is slower if it takes over
5 % longer (median of the ratios of all rounds) and the p20 to p80 ranges do not overlap; the exit status is then 1.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("head", nargs="?", default=str(ROOT), help="the working tree by default")
    parser.add_argument("--op", action="append", choices=ops(), help="all by default")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error("--rounds: a spread wants 3 at least")
    if options.device == "cuda":
        import torch  # which takes seconds

        if not torch.cuda.is_available():
            parser.error("--device cuda: no GPU here that torch can use; leave it out to compare on the CPU")
    if options.json:  # before versions are built and measured
        if options.json.is_dir():
            parser.error(f"--json: {options.json} is a folder; give the name of a file")
        options.json.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(built(version)) for version in (options.base, options.head)]
        rows: list[dict] = []
        print(f"{'case':<60} {'base, ms':>10} {'head, ms':>10} {'head / base':>12}")
        for op in options.op or ops():
            old, new = ((folder / f"avadclip_fast/ops/{op}.py").exists() for folder in folders)
            if new and not old:
                print(f"{op} is new: {options.base} has none to compare with")
                continue
            for row in compare(op, *folders, options.device, options.rounds):
                times = " ".join(f"{row[side]['median_ms']:>10.3f}" for side in ("base", "head"))
                print(f"{row['case']:<60} {times} {row['ratio']:>11.2f}x {'slower' * row['slower']}", flush=True)
                rows.append(row)
            if options.json:  # each time: a later op may end the run
                record = {"base": options.base, "head": options.head, "rows": rows}
                options.json.write_text(json.dumps(record, indent=1) + "\n")
    if slower := sum(row["slower"] for row in rows):
        sys.exit(f"{slower} of {len(rows)} cases are slower")


def ops() -> list[str]:
    """Returns the ops that have a bench with cases."""
    files = sorted((ROOT / "bench").glob("bench_*.py"))
    return [f.stem.removeprefix("bench_") for f in files if "def cases(" in f.read_text()]


@contextlib.contextmanager
def built(version: str) -> Iterator[Path]:
    """Yields a folder with the built avadclip_fast of a version."""
    if Path(version).is_dir():
        if not Path(version, "avadclip_fast/__init__.py").is_file():  # the environment's would be measured
            sys.exit(f"{version} is a folder without avadclip_fast: neither a checkout nor an installed version")
        yield Path(version).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        tree, target = Path(folder, "tree"), Path(folder, "installed")
        added = ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), version]
        if subprocess.run(added).returncode:
            sys.exit(f"{version} is neither a folder nor a revision that git can check out")
        try:
            install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), str(tree)]
            if subprocess.run([sys.executable, "-m", "pip", *install]).returncode:
                sys.exit(f"{version} cannot be built")
            yield target
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)])


def compare(op: str, base: Path, head: Path, device: str, rounds: int) -> list[dict]:
    """Returns a row per case; the versions alternate in going first."""
    with contextlib.ExitStack() as stack:
        sides = (("base", base), ("head", head))
        workers = [stack.enter_context(Worker(op, folder, device, side)) for side, folder in sides]
        if workers[0].cases != workers[1].cases:
            sys.exit(f"{op}: the versions serve different cases: {workers[0].cases} and {workers[1].cases}")
        rows = []
        for number, case in enumerate(workers[0].cases):
            times: list[list[float]] = [[], []]
            for round_ in range(rounds):
                for side in (0, 1) if round_ % 2 else (1, 0):
                    times[side].append(workers[side].measure(number))
            rows.append(verdict(f"{op}: {case}", *times))
        return rows


def verdict(case: str, base: list[float], head: list[float]) -> dict:
    """Compares the seconds of each round. base, head: seconds by round."""
    ratio = statistics.median(b / a for a, b in zip(base, head, strict=True))
    sides = {}
    for name, seconds in (("base", base), ("head", head)):
        p20, *_, p80 = (1e3 * x for x in statistics.quantiles(seconds, n=5, method="inclusive"))
        sides[name] = {"median_ms": 1e3 * statistics.median(seconds), "p20_ms": p20, "p80_ms": p80}
    slower = ratio > LIMIT and sides["head"]["p20_ms"] > sides["base"]["p80_ms"]
    return {"case": case, **sides, "ratio": ratio, "slower": slower}


class Worker:
    """A process with one version of the library that measures cases on request. side: its name in errors."""

    def __init__(self, op: str, folder: Path, device: str, side: str):
        self.name = f"{op}: the {side}"
        # Combine the bench of this tree with the library of that folder. In a checkout, its kernels/ lies beside it:
        # unless it is linked too, the kernels of the environment's editable install would be measured instead.
        self.cases_folder = tempfile.TemporaryDirectory()
        Path(self.cases_folder.name, "bench").symlink_to(ROOT / "bench")
        library = Path(self.cases_folder.name, "avadclip_fast")
        library.mkdir()
        for path in (*(folder / "avadclip_fast").glob("*"), folder / "kernels"):
            if path.exists() and not (library / path.name).exists():
                (library / path.name).symlink_to(path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.compare_worker", op, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": self.cases_folder.name, "PYTHONSAFEPATH": "1"}, text=True,
        )  # fmt: skip

    def __enter__(self) -> "Worker":
        self.cases: list[str] = self._answer()
        return self

    def measure(self, case: int) -> float:
        """Returns the seconds of one measurement."""
        assert self.process.stdin is not None
        print(case, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self):
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} could not be measured; what it says stands above")
        return json.loads(line)

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()  # closes the pipes as it waits
        self.cases_folder.cleanup()


if __name__ == "__main__":
    main()
