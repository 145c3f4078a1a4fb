"""Rows that take turns, and the table of their medians."""

import time
from collections.abc import Callable
from statistics import median

import torch


def interleaved(
    rows: dict[str, Callable[[int], None]],
    *,
    rounds: int,
    images: int,
    warm: int = 1,
    cpu_seconds: Callable[[], float] = lambda: time.process_time(),
) -> list[dict]:
    """Run each row in turn, `rounds` times after a first one (`warm`) that does not count.

    Returns, for each, medians of CPU and wall milliseconds an image, the first row's CPU and wall
    time divided by its own, as the median over the rounds, and each turn's wall time in seconds.
    """
    measured = {name: [] for name in rows}
    for turn in range(warm + rounds):
        for name, row in rows.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            row(turn)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent = cpu_seconds() - cpu, time.perf_counter() - wall
            if turn >= warm:
                measured[name].append(spent)
    first = next(iter(measured.values()))
    table = []
    for name, turns in measured.items():
        ratios = [
            [a / b for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(first, turns, strict=True)
        ]
        table.append(
            {
                "row": name,
                "walls": [turn[1] for turn in turns],
                **{
                    f"{clock}_ms": 1e3 / images * median(turn[i] for turn in turns)
                    for i, clock in enumerate(("cpu", "wall"))
                },
                **{
                    f"{clock}_ratio": median(ratio[i] for ratio in ratios)
                    for i, clock in enumerate(("cpu", "wall"))
                },
            }
        )
    return table


def print_table(title: str, table: list[dict]) -> None:
    print(f"\n{title}\n{'':32}{'CPU ms':>9}{'wall ms':>9}{'images/s':>10}{'CPU ×':>8}{'wall ×':>8}")
    for row in table:
        print(
            f"{row['row']:32}{row['cpu_ms']:9.3f}{row['wall_ms']:9.3f}"
            f"{1e3 / row['wall_ms']:10.1f}{row['cpu_ratio']:8.2f}{row['wall_ratio']:8.2f}"
        )
