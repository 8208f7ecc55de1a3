"""Look for known vulnerabilities in the installed packages with pip-audit; part of `make test`.

The exit code is 1 if there are any. Without the network, or with an index that does not list
vulnerabilities, nothing is audited; this is printed and is not a failure.
"""

import json
import subprocess
import sys
from typing import Any

COMMAND = ["-m", "pip_audit", "--skip-editable", "--progress-spinner", "off", "--format", "json"]


def main() -> int:
    try:
        process = subprocess.run(
            [sys.executable, *COMMAND], capture_output=True, text=True, timeout=120
        )
        packages = json.loads(process.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError):
        print("audit: no list of vulnerabilities available; nothing was audited")
        return 0
    is_vulnerable, line = judge(packages)
    print(line)
    return int(is_vulnerable)


def judge(packages: list[dict[str, Any]]) -> tuple[bool, str]:
    """Return whether a package is vulnerable, and a summary in one line.

    Args:
        packages: entries of `dependencies` in the JSON report of pip-audit.
    """
    audited = [package for package in packages if "skip_reason" not in package]
    known = [
        f"{package['name']} {package['version']} ({vulnerability['id']}, fixed in "
        f"{' or '.join(vulnerability['fix_versions']) or 'no version yet'})"
        for package in audited
        for vulnerability in package["vulns"]
    ]
    if known:
        return True, f"audit: known vulnerabilities in {'; '.join(known)}"
    return False, f"audit: {len(audited)} of {len(packages)} packages audited, none is vulnerable"


if __name__ == "__main__":
    sys.exit(main())
