"""Times the data stage on a gigabyte of rows: qcore and ``datasets.map`` + transformers.

Rows are single turns (half of them), conversations of two to five turns, and conversations with
tools and reasoning (a fifth), from a fixed seed. Both sides read the same file with the same number
of workers, each in a process of its own, one after the other. qcore does what `qcore train` does
before the first step: it reads, repairs and checks rows, renders each trained turn and its served
prompt, tokenizes, masks, and writes the samples to disk. The peer loads the file with `datasets`
and maps ``apply_chat_template(tokenize=True)`` over it: one rendering a row, no mask, no check.

    python benchmarks/data_scale.py --model FOLDER [--size 1000] [--workers N]
        [--containers jsonl,parquet] [--rounds 1] [--work FOLDER]

FOLDER holds config.json, the tokenizer's files and chat_template.jinja. Prints rows/s, the ratio,
the CPU time of both sides (which other work on the machine changes less), and for each process its
peak resident memory, and the median in the second quarter and in the last one of its run: equal
where memory is flat.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

LETTERS, WEIGHTS = "etaoinshrdlucmfwypvbgkqjxz", range(26, 0, -1)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city for some days.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
MEBI = 1 << 20


class Rows:
    """Rows from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        lengths = [self.rng.randint(2, 10) for _ in range(20_000)]
        self.words = ["".join(self.rng.choices(LETTERS, WEIGHTS, k=n)) for n in lengths]
        # Words of natural text are few and frequent, or many and rare.
        self.weights = [1 / (rank + 3) for rank in range(len(self.words))]
        total, self.sums = 0.0, []
        for weight in self.weights:
            total += weight
            self.sums.append(total)

    def text(self, low: int, high: int) -> str:
        """Some words with punctuation, digits and letters beyond ASCII in between."""
        words = self.rng.choices(self.words, cum_weights=self.sums, k=self.rng.randint(low, high))
        for at in range(10, len(words), 11):
            words[at] += self.rng.choice([".", ",", "!\n", " (3.14)", " é中"])
        return " ".join(words)

    def row(self) -> dict[str, Any]:
        """One row; ``tools`` is a JSON string, which Parquet can hold too."""
        kind = self.rng.random()
        if kind < 0.5:
            return {"messages": self._turn(10, 80, 20, 200), "tools": None}
        if kind < 0.8:
            messages = [{"role": "system", "content": self.text(15, 15)}]
            for _ in range(self.rng.randint(2, 5)):
                messages += self._turn(5, 60, 10, 150)
            return {"messages": messages, "tools": None}
        arguments = {"city": self.text(1, 1), "days": self.rng.randint(1, 9)}
        call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        said = {"role": "assistant", "content": "", "reasoning_content": self.text(60, 60)}
        messages = [
            {"role": "user", "content": self.text(20, 20)},
            {**said, "tool_calls": [call]},
            {"role": "tool", "content": json.dumps({"sky": self.text(3, 3)})},
            {**said, "content": self.text(60, 60)},
        ]
        if self.rng.random() < 0.5:
            messages += self._turn(20, 20, 60, 60)
            messages[-1]["reasoning_content"] = self.text(80, 80)
        return {"messages": messages, "tools": json.dumps([TOOL])}

    def _turn(self, *lengths: int) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": self.text(*lengths[:2])},
            {"role": "assistant", "content": self.text(*lengths[2:])},
        ]


def write(path: Path, size: int) -> int:
    """Write rows of about `size` bytes of JSON; the number of rows."""
    rows, count, written = Rows(1), 0, 0
    with path.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
        while written < size:
            row = rows.row()
            line = json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False)
            written += len(line.encode()) + 1
            file.write(line + "\n")
            count += 1
    return count


def as_parquet(path: Path) -> Path:
    """The same rows as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    arguments = pa.struct({"city": text, "days": pa.int64()})
    call = pa.struct({"type": text, "function": pa.struct({"name": text, "arguments": arguments})})
    message = pa.struct(
        {"role": text, "content": text, "reasoning_content": text, "tool_calls": pa.list_(call)}
    )
    schema = pa.schema({"messages": pa.list_(message), "tools": text})
    done = path.with_suffix(".parquet")
    with path.open("rb") as lines, pq.ParquetWriter(done, schema) as writer:
        batch: list[Any] = []
        for line in lines:
            batch.append(json.loads(line))
            if len(batch) == 4096:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))
    return done


def ours(model: str, path: str, workers: int, work: str) -> int:
    """The data stage of `qcore train`; the number of samples."""
    from qcore.config.settings import Settings
    from qcore.data.dataset import dataset
    from qcore.data.policies import Policies
    from qcore.data.sources.read import read_sources
    from qcore.preflight.rows import open_row_model
    from qcore.reporting import Reporter

    settings = Settings(max_length=1 << 15)
    opened = open_row_model(model, settings, Reporter())
    done = dataset(
        read_sources([path]), opened.model.checkpoint, opened.chat_format, settings.max_length,
        policies=Policies.of(settings), tokenizer=opened.tokenizer, reader=opened.reader,
        workers=workers,
    )  # fmt: skip
    return done.samples


def peer(model: str, path: str, workers: int, work: str) -> int:
    """``datasets.map`` with ``apply_chat_template``; the number of samples."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        tools = json.loads(row["tools"]) if row["tools"] else None
        return dict(tokenizer.apply_chat_template(row["messages"], tools=tools, tokenize=True))

    kind = "parquet" if path.endswith(".parquet") else "json"
    rows = datasets.load_dataset(kind, data_files=path, split="train", cache_dir=work)
    made = rows.map(tokenize, remove_columns=rows.column_names, num_proc=workers)
    return len(made)


def family(pid: int) -> Iterator[tuple[int, str, int, float]]:
    """Process, what it is, resident bytes and CPU seconds, of a process and those it started."""
    todo = [pid]
    while todo:
        one = todo.pop()
        try:
            command = Path(f"/proc/{one}/cmdline").read_bytes().decode(errors="replace")
            resident = int(Path(f"/proc/{one}/statm").read_text().split()[1])
            clock = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[11:13]
            children = Path(f"/proc/{one}/task/{one}/children").read_text().split()
        except (OSError, IndexError):
            continue
        todo += map(int, children)
        kinds = {"chat_template_worker": "template", "row_worker": "worker"}
        name = next((kind for word, kind in kinds.items() if word in command), "")
        name = name or ("main" if one == pid else "worker")
        seconds = sum(map(int, clock)) / os.sysconf("SC_CLK_TCK")
        yield one, name, resident * os.sysconf("SC_PAGESIZE"), seconds


def timed(side: str, arguments: argparse.Namespace, path: Path) -> tuple[float, float, list[str]]:
    """Seconds and CPU seconds of a side, and a line on the memory of each of its processes."""
    cpu: dict[int, float] = {}
    seen: dict[int, tuple[str, list[int]]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, __file__, "--side", side, "--model", arguments.model, "--path",
             str(path), "--workers", str(arguments.workers), "--work", work],
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "TMPDIR": work,
                 "HF_HOME": work, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        while process.poll() is None:
            for pid, name, resident, spent in family(process.pid):
                cpu[pid] = spent
                seen.setdefault(pid, (name, []))[1].append(resident)
            time.sleep(0.5)
        seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{side} failed with exit status {process.returncode}")
    lines = []
    for name, sizes in sorted(seen.values()):
        if len(sizes) < 8:
            continue
        quarter = len(sizes) // 4
        parts = sizes[quarter : 2 * quarter], sizes[-quarter:]
        early, late = (median(part) / MEBI for part in parts)
        lines.append(
            f"    {side} {name:9} peak {max(sizes) / MEBI:6.0f} MiB, second quarter "
            f"{early:6.0f}, last quarter {late:6.0f}"
        )
    return seconds, sum(cpu.values()), lines


def commit() -> str:
    """The commit of this checkout."""
    if "QCORE_COMMIT" in os.environ:
        return os.environ["QCORE_COMMIT"]
    asked = ["git", "describe", "--always", "--dirty"]
    return subprocess.check_output(asked, text=True, cwd=Path(__file__).parent).strip()


def compare(arguments: argparse.Namespace) -> None:
    """Run both sides on each container and print the comparison."""
    packages = ("datasets", "transformers", "tokenizers", "pyarrow")
    print(f"commit {commit()}, {platform.python_implementation()} {platform.python_version()}, "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          + ", ".join(f"{name} {version(name)}" for name in packages))  # fmt: skip
    folder = Path(arguments.work)
    jsonl = folder / "rows.jsonl"
    count = write(folder / "rows", arguments.size * 1_000_000)
    print(f"{count} rows, {jsonl.stat().st_size / 1e6:.0f} MB of JSONL, "
          f"{arguments.workers} workers", flush=True)  # fmt: skip
    for container in arguments.containers.split(","):
        path = jsonl if container == "jsonl" else as_parquet(jsonl)
        for number in range(arguments.rounds):
            times, cpu = {}, {}
            for side in ("qcore", "datasets"):
                times[side], cpu[side], lines = timed(side, arguments, path)
                print(*lines, sep="\n")
            mine, other = times["qcore"], times["datasets"]
            spent, theirs = cpu["qcore"], cpu["datasets"]
            print(f"    CPU time: qcore {spent:.1f} s, datasets.map {theirs:.1f} s, "
                  f"ratio {theirs / spent:.2f}")  # fmt: skip
            print(f"{container} round {number + 1}: qcore {mine:.1f} s, {count / mine:.0f} rows/s; "
                  f"datasets.map {other:.1f} s, {count / other:.0f} rows/s; "
                  f"ratio {other / mine:.2f}", flush=True)  # fmt: skip


def main() -> None:
    """Compare, or run one side."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--size", type=int, default=1000, help="MB of JSONL")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--containers", default="jsonl,parquet")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", default="")
    parser.add_argument("--side", choices=("qcore", "datasets"), help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run = ours if arguments.side == "qcore" else peer
        run(arguments.model, arguments.path, arguments.workers, arguments.work)
        return
    with tempfile.TemporaryDirectory(dir=arguments.work or None) as work:
        arguments.work = work
        compare(arguments)


if __name__ == "__main__":
    main()
