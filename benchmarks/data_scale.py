"""Times the data stage on a gigabyte of rows: qcore and ``datasets.map`` + transformers.

Rows are single turns (half of them), conversations of two to five turns, and conversations with
tools and reasoning (a fifth), from a fixed seed. Both sides read the same file with the same number
of workers, each in a process of its own, one after the other. qcore does what `qcore train` does
before the first step: it reads, repairs and checks rows, renders each trained turn and its served
prompt, tokenizes, masks, and keeps the samples on disk. It is then started again, which finds them.
The peer loads the file with `datasets` and maps ``apply_chat_template(tokenize=True)`` over it: one
rendering a row, no mask, no check, and so fewer tokens.

    python benchmarks/data_scale.py --model FOLDER [--size 1000] [--workers N]
        [--containers jsonl,parquet] [--rounds 1] [--work FOLDER]

FOLDER holds config.json, the tokenizer's files and chat_template.jinja. Prints rows/s, tokens/s,
the ratio, the CPU time of both sides (which other work on the machine changes less), the seconds of
the data stage of the second start, and for each process its peak resident memory, and the median in
the second quarter and in the last one of its run: equal where memory is flat.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import repeat
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
PART = 25_000_000  # bytes of JSON that one process writes
BATCH = 4096


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


def part(number: int, folder: str, size: int, parquet: bool) -> int:
    """Write one part of the rows; the number of rows."""
    rows, written, made = Rows(1), 0, []
    rows.rng.seed(number)  # all parts have the same words
    path = Path(folder) / f"part{number:04}"
    with path.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
        while written < size:
            row = rows.row()
            line = json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False)
            written += len(line.encode()) + 1
            file.write(line + "\n")
            made.append(row)
    if parquet:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path.with_suffix(".parquet"), schema()) as writer:
            for at in range(0, len(made), BATCH):
                writer.write_table(pa.Table.from_pylist(made[at : at + BATCH], schema()))
    return len(made)


def schema() -> Any:
    """The columns of the Parquet file."""
    import pyarrow as pa

    text = pa.string()
    arguments = pa.struct({"city": text, "days": pa.int64()})
    call = pa.struct({"type": text, "function": pa.struct({"name": text, "arguments": arguments})})
    message = pa.struct(
        {"role": text, "content": text, "reasoning_content": text, "tool_calls": pa.list_(call)}
    )
    return pa.schema({"messages": pa.list_(message), "tools": text})


def write(folder: Path, size: int, workers: int, parquet: bool) -> int:
    """Write the rows to ``rows.jsonl`` and, if asked for, ``rows.parquet``; their number."""
    parts = range(max(1, size // PART))
    with ProcessPoolExecutor(workers) as pool:
        args = repeat(str(folder)), repeat(min(size, PART)), repeat(parquet)
        counts = list(pool.map(part, parts, *args))
    with (folder / "rows.jsonl").open("wb") as file:
        for path in sorted(folder.glob("part*.jsonl")):
            file.write(path.read_bytes())
            path.unlink()
    if parquet:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetWriter(folder / "rows.parquet", schema()) as writer:
            for path in sorted(folder.glob("part*.parquet")):
                for batch in pq.ParquetFile(path).iter_batches(BATCH):
                    writer.write_table(pa.Table.from_batches([batch]))
                path.unlink()
    return sum(counts)


def ours(model: str, path: str, workers: int, work: str) -> dict[str, Any]:
    """The data stage of `qcore train`: its samples and tokens, and how long it took."""
    from qcore.config.settings import Settings
    from qcore.data.dataset import dataset
    from qcore.data.policies import Policies
    from qcore.data.sources.read import read_sources
    from qcore.data.store.cache import StoreCache
    from qcore.preflight.rows import open_row_model
    from qcore.reporting import Reporter

    settings = Settings(max_length=1 << 15)
    opened = open_row_model(model, settings, Reporter())
    started = time.monotonic()
    done = dataset(
        read_sources([path]), opened.model.checkpoint, opened.chat_format, settings.max_length,
        policies=Policies.of(settings), tokenizer=opened.tokenizer, reader=opened.reader,
        workers=workers, cache=StoreCache(Path(work) / "kept", 1 << 40),
    )  # fmt: skip
    took = time.monotonic() - started
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return {"samples": done.samples, "tokens": done.tokens, "stage": took, "resident": resident}


def peer(model: str, path: str, workers: int, work: str) -> dict[str, Any]:
    """``datasets.map`` with ``apply_chat_template``: its samples and tokens."""
    import datasets
    import pyarrow.compute as pc
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        tools = json.loads(row["tools"]) if row.get("tools") else None
        return dict(tokenizer.apply_chat_template(row["messages"], tools=tools, tokenize=True))

    kind = "parquet" if path.endswith(".parquet") else "json"
    rows = datasets.load_dataset(kind, data_files=path, split="train", cache_dir=work)
    made = rows.map(tokenize, remove_columns=rows.column_names, num_proc=workers)
    tokens = pc.sum(pc.list_value_length(made.data.column("input_ids"))).as_py()
    return {"samples": len(made), "tokens": tokens}


def family(pid: int) -> Iterator[tuple[int, str, int]]:
    """Process, what it is, and resident bytes, of a process and those it started."""
    todo = [pid]
    while todo:
        one = todo.pop()
        try:
            command = Path(f"/proc/{one}/cmdline").read_bytes().decode(errors="replace")
            resident = int(Path(f"/proc/{one}/statm").read_text().split()[1])
            children = Path(f"/proc/{one}/task/{one}/children").read_text().split()
        except (OSError, IndexError):
            continue
        todo += map(int, children)
        kinds = {"chat_template_worker": "template", "row_worker": "worker"}
        name = next((kind for word, kind in kinds.items() if word in command), "")
        name = name or ("main" if one == pid else "worker")
        yield one, name, resident * os.sysconf("SC_PAGESIZE")


@dataclass
class Run:
    """One run of a side: seconds, CPU seconds, what it printed, and its processes' memory."""

    seconds: float
    cpu: float
    made: dict[str, Any]
    memory: list[tuple[str, list[int]]]

    def lines(self, side: str) -> Iterator[str]:
        """The memory of the processes: the largest of a kind, where there are many."""
        kinds: dict[str, list[list[int]]] = {}
        for name, sizes in self.memory:
            if len(sizes) >= 8:
                kinds.setdefault(name, []).append(sizes)
        for name, all_sizes in sorted(kinds.items()):
            sizes = max(all_sizes, key=max)
            quarter = len(sizes) // 4
            early = median(sizes[quarter : 2 * quarter]) / MEBI
            late = median(sizes[-quarter:]) / MEBI
            yield (
                f"    {side} {len(all_sizes):2} {name:9} peak {max(sizes) / MEBI:6.0f} MiB, "
                f"second quarter {early:6.0f}, last quarter {late:6.0f}"
            )


def timed(side: str, arguments: argparse.Namespace, path: Path, work: str) -> Run:
    """Run one side in a process of its own."""
    seen: dict[int, tuple[str, list[int]]] = {}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, __file__, "--side", side, "--model", arguments.model, "--path",
         str(path), "--workers", str(arguments.workers), "--work", work],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "TMPDIR": work,
             "HF_HOME": work, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None:
        for pid, name, resident in family(process.pid):
            seen.setdefault(pid, (name, []))[1].append(resident)
        time.sleep(0.25)
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{side} failed with exit status {process.returncode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, cpu, json.loads(printed.splitlines()[-1]), list(seen.values()))


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
    folder, containers = Path(arguments.work), arguments.containers.split(",")
    size = arguments.size * 1_000_000
    count = write(folder, size, arguments.workers, "parquet" in containers)
    print(f"{count} rows, {(folder / 'rows.jsonl').stat().st_size / 1e6:.0f} MB of JSONL, "
          f"{arguments.workers} workers", flush=True)  # fmt: skip
    for container in containers:
        path = folder / f"rows.{container}"
        for number in range(arguments.rounds):
            print(f"{container} round {number + 1}", flush=True)
            runs = {}
            for side in ("qcore", "datasets"):
                with tempfile.TemporaryDirectory(dir=arguments.work) as work:
                    run = runs[side] = timed(side, arguments, path, work)
                    print(*run.lines(side), sep="\n")
                    print(f"    {side}: {run.seconds:.1f} s, {count / run.seconds:.0f} rows/s, "
                          f"{run.made['tokens'] / run.seconds:.0f} tokens/s, CPU {run.cpu:.1f} s, "
                          f"{run.made['samples']} samples, {run.made['tokens']} tokens",
                          flush=True)  # fmt: skip
                    if side == "qcore":
                        again = timed(side, arguments, path, work).made
                        print(f"    second start: data stage {again['stage']:.2f} s "
                              f"(the first one {run.made['stage']:.1f} s), "
                              f"{again['resident'] / MEBI:.0f} MiB resident after it",
                              flush=True)  # fmt: skip
            mine, other = runs["qcore"], runs["datasets"]
            print(f"    ratio of rows/s {other.seconds / mine.seconds:.2f}, "
                  f"of CPU time {other.cpu / mine.cpu:.2f}", flush=True)  # fmt: skip


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
        made = run(arguments.model, arguments.path, arguments.workers, arguments.work)
        print(json.dumps(made))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work or None) as work:
        arguments.work = work
        compare(arguments)


if __name__ == "__main__":
    main()
