"""Runs the benchmarks of several operations in one process: torch and the GPU are set up once, not for each.

    python -m bench.operations add_act mil_loss -- --device cuda --json build/gpu

What follows -- goes to every one of them. A failure is told, and the others run nevertheless.
"""

import runpy
import sys
import time
import traceback


def main() -> None:
    names, options = sys.argv[1:], []
    if "--" in names:
        at = names.index("--")
        names, options = names[:at], names[at + 1 :]
    failed = []
    for name in names:
        began = time.monotonic()
        sys.argv = [f"bench_{name}", *options]
        try:
            runpy.run_module(f"bench.bench_{name}", run_name="__main__")
        except (Exception, SystemExit) as error:
            if not isinstance(error, SystemExit):  # whose reason is told
                traceback.print_exc()
            failed.append(name)
        print(f"bench_{name}: {time.monotonic() - began:.1f} s", flush=True)
    sys.exit(f"not well: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
