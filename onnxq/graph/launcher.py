"""The start of a confined child process: limits first, then the program. It imports nothing of onnxq.

Usage: launcher.py MEMORY_BYTES SECONDS PROGRAM SOURCE DESTINATION
"""

from __future__ import annotations

import math
import runpy
import signal
import sys


def limit(memory_bytes: int, seconds: float) -> None:
    """Let the kernel end this process when it takes more memory or time, even when nobody waits for it."""
    if sys.platform == "win32":
        return
    import resource

    ceiling = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = memory_bytes if ceiling == resource.RLIM_INFINITY else min(memory_bytes, ceiling)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(math.ceil(seconds) + 5)


def main() -> int:
    """Exit code 0; or 1 and the reason as the last line of stderr."""
    memory_bytes, seconds, program = sys.argv[1:4]
    sys.argv = sys.argv[3:]
    try:
        limit(int(memory_bytes), float(seconds))
        runpy.run_path(program, run_name="__main__")
    except MemoryError:
        print("out of memory", file=sys.stderr)
        return 1
    except Exception as error:
        text = " ".join(str(error).split())
        print(f"{type(error).__name__}: {text}" if text else type(error).__name__, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
