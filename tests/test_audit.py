from tests.audit import judge

SAFE = {"name": "safe", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "unknown", "skip_reason": "not found on PyPI"}
BAD = {
    "name": "bad",
    "version": "2.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}, {"id": "PYSEC-2", "fix_versions": []}],
}


def test_a_vulnerable_package_is_found_and_named():
    found, line = judge([SAFE, BAD, UNKNOWN])
    assert found
    assert line.endswith(
        "in bad 2.0 (PYSEC-1, mended in 2.1); bad 2.0 (PYSEC-2, mended in no version yet)"
    )


def test_what_nobody_knows_of_does_not_count_as_audited():
    assert judge([SAFE, UNKNOWN]) == (False, "audit: 1 of 2 packages audited, none is vulnerable")
