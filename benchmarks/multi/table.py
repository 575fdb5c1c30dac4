"""Records of `multi_gpu`, a JSON line each, and the table that is printed of them at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
LONG = ("terms", "step_seconds", "step_host")  #: what is not printed of a record at once


def read(path: Path) -> list[Record]:
    """The records of a file; a last line that is cut off is left out."""
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def append(path: Path, record: Record) -> None:
    """Append a record to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def is_wrong(record: Record) -> bool:
    """Whether a record says that something failed, or that ranks compute other numbers."""
    checks = ("finite", "same_on_all_ranks", "same_first_loss")
    return "failed" in record or any(record.get(name) is False for name in checks)


def brief(record: Record) -> str:
    """A record as a line, without what the table does not show."""
    shown = {name: _rounded(value) for name, value in record.items() if name not in LONG}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return "/".join(str(_rounded(one)) for one in value)
    return f"{value:.6g}" if isinstance(value, float) else value


def lines(records: Sequence[Record]) -> Iterator[str]:
    """The tables of times and of gradients, then what failed or was left out."""
    yield from dict.fromkeys(
        f"{record['machine']}; {record['ranks']} ranks, each on {record['cores'] or 'all'} cores"
        for record in records
        if "machine" in record
    )
    timed = [record for record in records if "seconds" in record]
    if timed:
        yield (
            f"{'case':30}{'placement':>10}{'ranks':>6}{'tokens/s':>10}{'x one':>7}{'of data':>8}"
            f"{'s/step':>8}{'min':>8}{'max':>8}{'host s':>14}{'plan s':>8}"
            f"{'peak GB':>15}{'plan GB':>8}"
            f"{'off':>7}{'weights GB':>15}{'4-bit GB':>10}{'sum ms':>8}{'1st s':>7}  policy"
        )
        yield from map(_time, timed)
        yield from filter(None, map(_checks, timed))
    compared = [record for record in records if "beside" in record]
    if compared:
        yield (
            f"{'gradients of':30}{'placement':>10}{'ranks':>6}{'beside':>10}{'worst':>10}"
            f"{'median':>10}  tensor"
        )
        yield from map(_gradients, compared)
    seen = set()
    for record in records:
        if "failed" in record and _start(record) not in seen:
            # The other ranks of a case then lose their connection.
            seen.add(_start(record))
            yield f"{_start(record)} FAILED: {record['failed']}"
        if "skipped" in record:
            yield f"{record['case']}: left out {record['skipped']}: {record['why']}"


def _start(record: Record) -> str:
    return f"{record['case']:30}{record.get('placement', ''):>10}{record.get('ranks', 1):>6}"


def _time(record: Record) -> str:
    peaks, planned = record["peak_bytes"], record.get("plan_bytes", 0)
    times, share = record.get("times_one"), record.get("of_data")
    expected = record.get("plan_seconds")
    off = f"{planned / max(peaks) - 1:+.1%}" if planned and max(peaks) else "-"
    return (
        f"{_start(record)}{record['tokens_per_second']:10.0f}"
        f"{'-' if times is None else f'{times:.3f}':>7}"
        f"{'-' if share is None else f'{share:.1%}':>8}"
        f"{record['seconds']:8.4f}{record['least']:8.4f}{record['most']:8.4f}"
        f"{_between(record.get('host_seconds', [0]), 4):>14}"
        f"{'-' if expected is None else f'{expected:.3f}':>8}{_each(peaks):>15}"
        f"{planned / 1e9:8.2f}{off:>7}{_each(record['weights_bytes']):>15}"
        f"{_each(record.get('layer_bytes', [0])):>10}"
        f"{f'{s:.2f}' if (s := record.get('sum_ms')) is not None else '-':>8}"
        f"{record['first_seconds']:7.1f}  {record['policy']}"
    )


def _each(sizes: Sequence[int]) -> str:
    """Bytes of all ranks in GB: least to most."""
    return _between([size / 1e9 for size in sizes], 2)


def _between(values: Sequence[float], digits: int) -> str:
    least, most = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return least if least == most else f"{least}-{most}"


def _checks(record: Record) -> str:
    """What is wrong or remarkable about the losses."""
    text = f"{_start(record)} losses " + ", ".join(f"{loss:.5f}" for loss in record["losses"])
    if not record["finite"]:
        text += "; NOT FINITE"
    if record.get("same_on_all_ranks") is False:
        text += "; NOT THE SAME ON ALL RANKS"
    if record.get("same_first_loss") is False:
        text += "; THE FIRST LOSS IS NOT THAT OF ONE CARD"
    if "off_one_card" in record:
        text += f"; off one card by at most {max(record['off_one_card']):.1e}"
    return text


def _gradients(record: Record) -> str:
    text = (
        f"{_start(record)}{record['beside']:>10}{record['worst']:10.1e}{record['median']:10.1e}"
        f"  {record['tensor']} of {record['tensors']}"
    )
    return text if record.get("same_on_all_ranks", True) else f"{text}; RANKS DIFFER"
