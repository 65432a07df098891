"""Tables of `mapper serve` and `mapper published`. They print what the records hold and compute nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mapper.report.numbers import count, seconds
from mapper.report.terminal import console, table

if TYPE_CHECKING:
    from mapper.published.evaluate import Outcome

SCORES = ("rows", "median", "MAPE", "p90", "bias")


def served(done: Mapping[str, Any]) -> None:
    """One served workload: latencies and throughput."""
    numeric = ("mean", "p50", "p90", "p99")
    made = table("", "", *numeric, right=numeric)
    names = {"ttft_s": "time to first token", "tpot_s": "time per output token", "latency_s": "latency"}
    for key, name in names.items():
        made.add_row(name, *(seconds(done[key][column]) for column in numeric))
    out = console()
    out.print(made)
    out.print(
        f"{done['requests']} requests in {seconds(done['seconds'])}: {count(done['tokens_per_s'])} tokens/s, "
        f"{count(done['tokens_per_s_per_user'])} tokens/s/user; "
        f"{done['mean_in_system']:.1f} in the system on average; "
        f"the cache holds {done['cache_tokens']:,} tokens"
    )
    out.print("Modelled, from the machine's constants.")


def compared(outcomes: Sequence[Outcome], found: Mapping[str, Any]) -> None:
    """Errors by framework, source and system, on rows that calibration left out and on those it used."""
    out = console()
    for subset, title in (
        ("left_out", "rows left out of calibration"),
        ("fitted", "rows of the calibration subset"),
    ):
        made = table(title, "by", "", *SCORES, right=SCORES)
        groups = found[subset]
        for key in ("framework", "source", "system"):
            for name, score in groups[key].items():
                made.add_row(key, name, *_score(score))
        if groups["over_all"] is not None:
            made.add_row("all", "", *_score(groups["over_all"]))
            out.print(made)
    reasons = Counter(o.reason for o in outcomes if o.predicted is None)
    made = table("excluded", "rows", "reason", right=("rows",))
    for reason, rows in reasons.most_common():
        made.add_row(str(rows), reason or "")
    out.print(made)
    out.print("Errors: |predicted / published - 1|. Each row: --json.")


def _score(score: Mapping[str, float]) -> list[str]:
    shares = (f"{100 * score[key]:.1f} %" for key in ("median", "mape", "p90"))
    return [str(score["rows"]), *shares, f"{100 * score['bias']:+.1f} %"]
