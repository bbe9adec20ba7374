"""What other scanners say of files: run by `trust.py scanners` with the Python of their own environment.

    PEERS/bin/python scanners.py TOOL FOLDER

prints one JSON object, file → [verdict, seconds]. A verdict is "clean", "flagged", or "error" where the tool raises,
skips the file, takes more than 30 seconds or more than 4 GB.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from zipfile import is_zipfile

SECONDS, MEMORY = 30, 4 * 2**30


def picklescan(strict: bool) -> Callable[[Path], str]:
    from picklescan.scanner import scan_file_path

    def scan(path: Path) -> str:
        found = scan_file_path(str(path), strict=strict)
        if found.issues_count:
            return "flagged"
        return "error" if found.scan_err or not found.scanned_files else "clean"

    return scan


def modelscan() -> Callable[[Path], str]:
    from modelscan.modelscan import ModelScan

    def scan(path: Path) -> str:
        tool = ModelScan()
        found = tool.scan(path)
        if found["summary"]["total_issues"]:
            return "flagged"
        return "error" if found["errors"] or not found["summary"]["scanned"]["total_scanned"] else "clean"

    return scan


def fickling() -> Callable[[Path], str]:
    from fickling.loader import scan_file, scan_zip_archive

    def scan(path: Path) -> str:
        if is_zipfile(path):
            found = list(scan_zip_archive(str(path), graceful=True).values())
        else:
            found = [scan_file(str(path), graceful=True)]
        if not any(one.results for one in found):
            return "error"  # it could read nothing, and calls that suspicious
        return "clean" if all(one.is_safe for one in found) else "flagged"

    return scan


TOOLS: dict[str, Callable[[], Callable[[Path], str]]] = {
    "picklescan": lambda: picklescan(strict=False),
    "picklescan --strict": lambda: picklescan(strict=True),
    "modelscan": modelscan,
    "fickling": fickling,
}


def stop(*_: object) -> None:
    raise TimeoutError


def main() -> None:
    logging.disable()
    scan = TOOLS[sys.argv[1]]()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, stop)
    said = {}
    for path in sorted(Path(sys.argv[2]).iterdir()):
        started = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            verdict = scan(path)
        except BaseException:  # noqa: BLE001  (RecursionError, MemoryError, SystemExit: all of them are no verdict)
            verdict = "error"
        signal.alarm(0)
        said[path.name] = [verdict, time.perf_counter() - started]
    print(json.dumps(said))


if __name__ == "__main__":
    main()
