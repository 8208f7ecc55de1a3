"""Are there known vulnerabilities in what is installed? pip-audit asks PyPI; part of `make test`.

Exit code 1 when there are. A machine without the network, or whose index tells of no
vulnerabilities, has not been audited: that is said, and is no failure.
"""

import json
import subprocess
import sys
from typing import Any

COMMAND = ["-m", "pip_audit", "--skip-editable", "--progress-spinner", "off", "--format", "json"]


def main() -> int:
    try:
        done = subprocess.run(
            [sys.executable, *COMMAND], capture_output=True, text=True, timeout=120
        )
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError):
        print("audit: no answer about vulnerabilities; nothing was audited")
        return 0
    found, line = judge(packages)
    print(line)
    return int(found)


def judge(packages: list[dict[str, Any]]) -> tuple[bool, str]:
    """Whether one is vulnerable, and a line that says so, from what pip-audit tells of each."""
    answered = [package for package in packages if "skip_reason" not in package]
    known = [
        f"{package['name']} {package['version']} ({vulnerability['id']}, mended in "
        f"{' or '.join(vulnerability['fix_versions']) or 'no version yet'})"
        for package in answered
        for vulnerability in package["vulns"]
    ]
    if known:
        return True, f"audit: known vulnerabilities in {'; '.join(known)}"
    return False, f"audit: {len(answered)} of {len(packages)} packages audited, none is vulnerable"


if __name__ == "__main__":
    sys.exit(main())
