"""Findings of many rows: which of them share a line, and what the line counts."""

from __future__ import annotations

from qcore.data.findings import KINDS, NOTE, WARNING, DataFinding, Findings


def note(row: int, message: str, severity: str = NOTE, field: str = "") -> DataFinding:
    return DataFinding(code="QC-DATA-052", severity=severity, row=row, field=field, message=message)


def test_each_statement_of_a_code_has_its_own_count() -> None:
    findings = Findings()
    findings.add(note(1, "answers no user turn: it is not trained", WARNING))
    findings.add(note(1, "1 turn at the end without an answer: left out", WARNING))
    findings.add(note(4, "2 turns at the end without an answer: left out", WARNING))
    assert list(findings.lines()) == [
        "warning: QC-DATA-052: answers no user turn: it is not trained (row 1)",
        "warning: QC-DATA-052: 1 turn at the end without an answer: left out (2 in 2 rows: 1, 4)",
    ]
    assert [(entry["count"], entry["rows"]) for entry in findings.summary()] == [(1, 1), (2, 2)]


def test_names_and_numbers_do_not_split_a_line() -> None:
    findings = Findings()
    for row, name in enumerate(("a", "b", "c"), 1):
        findings.add(note(row, f"calls '{name}{row}', but the row has {row} tools"))
    (line,) = findings.lines()
    assert line == "QC-DATA-052: calls 'a1', but the row has 1 tools (3 in 3 rows: 1, 2, 3)"


def test_totals_stand_alone() -> None:
    findings = Findings()
    for key, rows in (("url", 2), ("lang", 5)):
        findings.add(note(0, f"{key} is not read ({rows} rows)", field=key))
    assert list(findings.lines()) == [
        "QC-DATA-052: url is not read (2 rows) (url)",
        "QC-DATA-052: lang is not read (5 rows) (lang)",
    ]


def test_the_number_of_lines_is_bounded() -> None:
    findings = Findings()
    for n in range(KINDS + 10):
        findings.add(note(n + 1, "x" * (n + 1)))
    lines = list(findings.lines())
    assert len(lines) == KINDS + 1
    assert "more findings, the first of them: " in lines[-1]
    assert "(10 in 10 rows: " in lines[-1]
