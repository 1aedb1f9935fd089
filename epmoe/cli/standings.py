"""What bench layer found, to be read: tables, lines of CSV, a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from epmoe.cli.contest import OURS
from epmoe.cli.tables import show

HEAD = "shape,rows,ranks,load_of,experts,format,skew,contestant,median_us,p10_us,p90_us,floor_us"


def lines_of(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as CSV: one line for each shape, number of rows and contestant."""
    yield HEAD
    for e in report["entries"]:
        for who, us in e["us"].items():
            front = (e["shape"], e["rows"], report["ranks"], report["load_of"], e["experts"])
            name = who.replace(",", " +")
            times = (us["median"], us["p10"], us["p90"], e["floor_us"])
            yield ",".join(map(str, (*front, report["format"], report["skew"], name, *times)))


def print_tables(report: Mapping[str, Any]) -> None:
    """What it ran on; times beside floor and peer; where the split path's time goes."""
    print(f"  on {report['ranks']} x {report['gpu']}, {', '.join(report['machine'].values())}")
    contestants = list(dict.fromkeys(who for e in report["entries"] for who in e["us"]))
    ours = [who for who in contestants if who in OURS]
    peers = [who for who in contestants if who not in OURS]

    def cells(e: Mapping[str, Any]) -> tuple[str, ...]:
        median = {who: us["median"] for who, us in e["us"].items()}
        best = min(median[who] for who in ours)
        rival = min((median[who] for who in peers), default=float("nan"))
        return (
            e["shape"],
            f"{e['rows']:,}",
            f"{e['floor_us']:,.0f}",
            *(f"{median[who]:,.0f}" for who in contestants),
            f"{best / rival:.2f}",
            f"{best / e['floor_us']:.2f}",
        )

    for line in report["warning"]:
        print(f"  {line}")
    show(
        f"one forward{_load(report)}, {report['format']}, skew {report['skew']}, us, slowest rank, "
        f"median of {report['rounds']}",
        ("shape", ">rows", ">floor", *(f">{who}" for who in contestants), ">to peer", ">to floor"),
        [cells(e) for e in report["entries"]],
    )
    verbs = list(report["entries"][0]["verbs_us"])
    show(
        f"split, verb by verb{_load(report)}, us",
        ("shape", ">rows", *(f">{verb}" for verb in verbs)),
        [
            (e["shape"], f"{e['rows']:,}", *(f"{e['verbs_us'][v]['median']:,.0f}" for v in verbs))
            for e in report["entries"]
        ],
    )


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Times over rows per rank, both logarithmic; one field for each shape."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(e["shape"] for e in report["entries"]))
    figure, fields = pyplot.subplots(1, len(names), figsize=(4 * len(names), 4), squeeze=False)
    for field, name in zip(fields[0], names, strict=True):
        entries = [e for e in report["entries"] if e["shape"] == name]
        rows = [e["rows"] for e in entries]
        for who in entries[0]["us"]:
            field.plot(rows, [e["us"][who]["median"] for e in entries], "o-", label=who)
        field.plot(rows, [e["floor_us"] for e in entries], "k:", label="floor")
        field.set(xscale="log", yscale="log", title=name, xlabel="rows per rank", ylabel="us")
        field.legend(fontsize="small")
    figure.suptitle(
        f"{report['ranks']} x {report['gpu']}{_load(report)}, {report['format']}, {report['date']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _load(report: Mapping[str, Any]) -> str:
    of, ranks = report["load_of"], report["ranks"]
    return "" if of == ranks else f" (load of 1 rank of {of}, on {ranks}; NOT {of} GPUs)"
