"""Run the slow tests that count what was survived, and append the counts, with where they come from, to
bench/results/endurance.csv: processes killed, files mutated, requests made up.

python scripts/record_tests.py kills mutations requests
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from record import ROOT, append, provenance

TESTS = {
    "kills": "tests/sessions/test_crash.py::test_killed_at_200_moments",
    "mutations": "tests/sessions/test_fuzz.py::test_ten_thousand_mutations",
    "requests": "tests/server/test_api_fuzz.py::test_many_requests_from_the_document",
}


def run(name: str) -> list[dict[str, object]]:
    """One row per count that the tests recorded. Exits with pytest's output if one of them failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-q", "-p", "no:xdist", f"--junitxml={report}", TESTS[name]]
        began = time.monotonic()
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout)
        suite = next(ElementTree.parse(report).iter("testsuite"))
        counts: dict[str, int] = {}
        for x in suite.iter("property"):
            if not x.attrib["value"].isdigit():  # Hypothesis' own
                continue
            counts[x.attrib["name"]] = counts.get(x.attrib["name"], 0) + int(x.attrib["value"])
        failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    where = {**provenance([]), "command": f"pytest {TESTS[name]}"}
    seconds = round(time.monotonic() - began, 1)
    tests = {"tests": suite.attrib["tests"], "failed": failed, "seconds": seconds}
    return [{**where, "what": what, "count": n, **tests} for what, n in counts.items()]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        rows = run(name)
        append(ROOT / "bench" / "results" / "endurance.csv", rows)
        print(*rows, sep="\n")
