import re

from tests.audit import judge

SAFE = {"name": "safe", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "unknown", "skip_reason": "not found on PyPI"}
BAD = {
    "name": "bad",
    "version": "2.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}, {"id": "PYSEC-2", "fix_versions": []}],
}


def test_audit_names_a_vulnerable_package():
    is_vulnerable, line = judge([SAFE, BAD, UNKNOWN])
    assert is_vulnerable
    assert re.findall("PYSEC-[0-9]", line) == ["PYSEC-1", "PYSEC-2"]
    assert "bad 2.0" in line
    assert "2.1" in line  # the version that fixes the first one
    assert "safe 1.0" not in line
    assert "\n" not in line


def test_audit_does_not_count_unknown_packages():
    is_vulnerable, line = judge([SAFE, UNKNOWN])
    assert not is_vulnerable
    assert re.findall("[0-9]+", line) == ["1", "2"]
