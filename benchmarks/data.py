"""How long a data set takes to be ready, and how much memory it takes, against the tokenizer alone.

    python -m benchmarks.data --write-docs            # 20,000, 200,000 and 1,000,000 pairs, into docs/results/data.md
    python -m benchmarks.data --pairs 20000
    python -m benchmarks.data --tokenizer models/my-model

Rows are random words of the package's sentiment data, seeded, about 170 bytes each. Each start is a process of its own. The
tokenizer alone is ``encode_batch`` of the ``tokenizers`` library on the first 20,000 rows, both answers with their prompts; it is
measured before and after the first start, because on a machine with other work the two differ.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown
from tokenpref._paths import data_root

SIZES = (20_000, 200_000, 1_000_000)
BARE_ROWS = 20_000
TINY = "package://data/tiny/model"
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "data.md"
HEAD = (
    "pairs",
    "file (MB)",
    "tokenizer alone (pairs/s)",
    "with ids and spans (pairs/s)",
    "first start (s)",
    "first start (pairs/s)",
    "ratio to alone",
    "ratio to ids and spans",
    "later start (s)",
    "own memory, first (MiB)",
    "own memory, later (MiB)",
    "mapped, later (MiB)",
    "cache (MB)",
)


def write_rows(file: Path, count: int) -> None:
    """Write ``count`` rows of prompt, chosen and rejected."""
    text = (data_root() / "data" / "sentiment" / "train.jsonl").read_text(encoding="utf-8")
    words = sorted(
        {word for line in text.splitlines() for word in " ".join(map(str, json.loads(line).values())).split()}
    )
    generator = random.Random(0)

    def some(fewest: int, most: int) -> str:
        return " ".join(generator.choices(words, k=generator.randint(fewest, most)))

    with file.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            row = {"prompt": some(4, 10), "chosen": " " + some(4, 10), "rejected": " " + some(4, 10)}
            stream.write(json.dumps(row) + "\n")


def own_memory() -> dict[str, float]:
    """MiB of this process: its own, and files that are mapped into it."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


def bare(file: Path, tokenizer: Any) -> dict[str, float]:
    """The tokenizer's own batched rate."""
    texts = []
    with file.open(encoding="utf-8") as stream:
        for line, _ in zip(stream, range(BARE_ROWS), strict=False):
            row = json.loads(line)
            texts += [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]
    found = {}
    for name in ("rate", "rate_read"):
        start = time.perf_counter()
        for at in range(0, len(texts), 2000):
            encodings = tokenizer._tokenizer.encode_batch(texts[at : at + 2000], add_special_tokens=False)
            if name == "rate_read":
                for encoding in encodings:
                    assert len(encoding.ids) == len(encoding.offsets)
        found[name] = len(texts) / 2 / (time.perf_counter() - start)
    return found


def started(file: Path, tokenizer: Any) -> dict[str, float]:
    """A start: seconds until the data set is there and has told what a training asks at its start, and memory."""
    from tokenpref.data import preference_dataset

    before = own_memory()
    start = time.perf_counter()
    dataset = preference_dataset(tokenizer, str(file))
    told = dataset.fingerprint(), dataset.longest, dataset.highest_id, dataset.report.summary()
    seconds = time.perf_counter() - start
    generator = random.Random(1)
    for _ in range(2000):
        index = generator.randrange(len(dataset))
        assert dataset[index].chosen_ids and dataset.raw(index) and told
    after = own_memory()
    return {
        "seconds": seconds,
        "own": after["RssAnon"] - before["RssAnon"],
        "mapped": after["RssFile"] - before["RssFile"],
    }


def measure(what: str, file: Path, tokenizer: str, cache: Path) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.data",
        "--measure",
        what,
        "--file",
        str(file),
        "--tokenizer",
        tokenizer,
    ]
    environment = {**os.environ, "TOKENPREF_CACHE": str(cache)}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_size(count: int, tokenizer: str, folder: Path) -> list[str]:
    """The row of the table for so many pairs."""
    file, cache = folder / f"{count}.jsonl", folder / f"cache{count}"
    write_rows(file, count)
    alone = [measure("bare", file, tokenizer, cache)]
    first = measure("start", file, tokenizer, cache)
    alone.append(measure("bare", file, tokenizer, cache))
    later = measure("start", file, tokenizer, cache)
    rate, rate_read = (sum(one[name] for one in alone) / 2 for name in ("rate", "rate_read"))
    own_rate = count / first["seconds"]
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    row = [
        f"{count:,}",
        f"{file.stat().st_size / 1e6:.1f}",
        f"{rate:,.0f}",
        f"{rate_read:,.0f}",
        f"{first['seconds']:.1f}",
        f"{own_rate:,.0f}",
        f"{own_rate / rate:.2f}",
        f"{own_rate / rate_read:.2f}",
        f"{later['seconds']:.2f}",
        f"{first['own']:.0f}",
        f"{later['own']:.0f}",
        f"{later['mapped']:.0f}",
        f"{size / 1e6:.0f}",
    ]
    print(dict(zip(HEAD, row, strict=True)), flush=True)
    return row


def report(rows: list[list[str]], tokenizer: str) -> str:
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("tokenizers", "datasets", "pyarrow", "numpy")
    )
    return f"""# Data sets: time and memory until the data is ready

`python -m benchmarks.data` measured this page. Python {platform.python_version()}, {libraries}.
{os.cpu_count()} cores of {platform.machine()}, a load average of {os.getloadavg()[0]:.1f} at the end. Tokenizer: `{tokenizer}`.

{markdown(HEAD, rows)}

- *Tokenizer alone*: `encode_batch` of the `tokenizers` library on all cores, on the first {BARE_ROWS:,} rows. It is the mean of
  one measurement before the first start and one after it. *With ids and spans*: `ids` and `offsets` of every text are read too.
- *First start*: the file is read, tokenised and written to the cache. The ratios compare its pairs per second with both rates.
- *Later start*: a new process opens the cache and verifies all checksums.
- *Own memory*: growth of the process's memory without mapped files, after it has read 2,000 pairs with their source rows.
- *Mapped*: pages of the cache that the process has touched. The kernel takes them back when memory is short, and all ranks of
  a machine share them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=SIZES)
    parser.add_argument("--tokenizer", default=TINY)
    parser.add_argument("--write-docs", action="store_true", help="write docs/results/data.md")
    parser.add_argument("--measure", choices=("bare", "start"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        from tokenpref.data import tokenizer_json

        tokenizer = tokenizer_json(arguments.tokenizer)
        found = (bare if arguments.measure == "bare" else started)(arguments.file, tokenizer)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = [one_size(count, arguments.tokenizer, Path(folder)) for count in arguments.pairs]
    text = report(rows, arguments.tokenizer)
    if not arguments.write_docs:
        print(text)
    else:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
