"""How long imports take, as ratios of `import numpy`: a ratio says the same on a slow machine and on a fast one.

usage: python benchmarks/import_time.py [rounds]
"""

from __future__ import annotations

import statistics
import subprocess
import sys

NUMPY = "import numpy"
CASES = ("import crucible_framework", "import crucible_framework as cf; cf.TrainConfig", "import crucible_framework as cf; cf.load_dataset; cf.Trainer")
TIMER = "import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"


def seconds(code: str) -> float:
    """The time that a fresh interpreter takes for `code`, without its own start."""
    done = subprocess.run([sys.executable, "-c", TIMER.format(code=code)], capture_output=True, text=True, check=True)  # noqa: S603  # our own code
    return float(done.stdout)


def main(rounds: int) -> None:
    """Measures all in turn, so that a busy machine slows all alike, and prints medians."""
    codes = (NUMPY, *CASES)
    for code in codes:
        seconds(code)  # fills the disk cache and __pycache__
    table = [[seconds(code) for code in codes] for _ in range(rounds)]
    for column, code in enumerate(codes):
        ratio = statistics.median(row[column] / row[0] for row in table)
        print(f"{ratio:5.2f} × {NUMPY}  {statistics.median(row[column] for row in table) * 1e3:5.0f} ms  {code}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
