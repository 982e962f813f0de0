"""What `ftrun data` shows: the first rows as the model will see them, lengths, and what was left out and why."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftrun.data.load import Corpus
from ftrun.data.rows import Rows

_BINS = 12
_BAR = 40
_WORDS = {
    "read": "rows read",
    "train": "rows to train on",
    "held_out": "rows held out for evaluation",
    "bad": "rows that cannot be read, left out",
    "nothing_to_learn": "rows with nothing to learn, left out",
    "overlong": "rows longer than seq_len, left out",
    "truncated": "rows longer than seq_len, cut",
    "windows": "windows that plain text was split into",
    "turns_apart": "rows that stand for one turn each (the template rewrites earlier turns)",
    "system_folded": "system prompts put into the first question (the template has none)",
    "tools_unseen": "rows whose tools the chat template does not show",
    "duplicates": "rows that are copies of another",
}


def data_report(corpus: Corpus, tokenizer: Any, n: int) -> dict[str, Any]:
    """The first n training rows and the whole corpus in figures, as a JSON-able dict.

    rows: {where, tokens, supervised, ids, texts, learnt, pieces: [{text, learnt}]}; lengths: {min, median, mean, p90,
    p99, max, histogram: [{from, to, rows}]}; supervised_share: learnt tokens among all; counts, left_out, sources and
    template as `Corpus` has them.
    """
    train = corpus.train
    return {
        "template": corpus.template,
        "counts": corpus.counts,
        "supervised_share": corpus.counts["supervised"] / max(1, corpus.counts["tokens"]),
        "sources": corpus.sources,
        "lengths": _lengths(train.lengths),
        "left_out": corpus.left_out,
        "rows": [_row(train, i, tokenizer) for i in range(min(n, len(train)))],
    }


def render(report: dict[str, Any], console: Console) -> None:
    """Prints a report. Learnt stretches are green, and stand between ⟦ and ⟧."""
    for row in report["rows"]:
        console.rule(Text(f"{row['where']}  {row['tokens']} tokens, {row['supervised']} learnt"), align="left")
        console.print(_marked(row["pieces"]), soft_wrap=True, highlight=False)
    console.rule("⟦ learnt ⟧", align="left")
    figures = [f"{k} {report['lengths'][k]:,}" for k in ("min", "median", "mean", "p90", "p99", "max")]
    console.print(f"tokens a row: {', '.join(figures)}", highlight=False)
    console.print(_histogram(report["lengths"]))
    console.print(_summary(report))
    for entry in report["left_out"]:
        console.print(Text(f"left out: {entry['where']}: {entry['why']}", style="yellow"), soft_wrap=True)


def _row(rows: Rows, i: int, tokenizer: Any) -> dict[str, Any]:
    ids, learnt = rows.ids(i).tolist(), rows.learn(i).astype(bool).tolist()
    prefix = len(rows.prefix_ids)
    texts = [f"<prompt {k}>" for k in range(prefix)] + [_decode(tokenizer, [one]) for one in ids[prefix:]]
    pieces = [{"text": "".join(texts[:prefix]), "learnt": False}] if prefix else []
    for flag, group in itertools.groupby(zip(ids[prefix:], learnt[prefix:], strict=True), key=lambda pair: pair[1]):
        pieces.append({"text": _decode(tokenizer, [one for one, _ in group]), "learnt": flag})
    return {
        "where": rows.where(i),
        "tokens": len(ids),
        "supervised": int(rows.supervised[i]),
        "ids": ids,
        "texts": texts,
        "learnt": learnt,
        "pieces": pieces,
    }


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.linspace(low, high + 1, min(_BINS, high - low + 1) + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    p50, p90, p99 = (int(v) for v in np.percentile(lengths, [50, 90, 99]))
    return {
        "min": low,
        "median": p50,
        "mean": round(float(lengths.mean()), 1),
        "p90": p90,
        "p99": p99,
        "max": high,
        "histogram": [
            {"from": int(a), "to": int(b) - 1, "rows": int(c)}
            for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True)
        ],
    }


def _marked(pieces: list[dict[str, Any]]) -> Text:
    text = Text()
    for piece in pieces:
        if piece["learnt"]:
            text.append(f"⟦{piece['text']}⟧", style="bold green")
        else:
            text.append(piece["text"], style="dim")
    return text


def _histogram(lengths: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    most = max(bin["rows"] for bin in lengths["histogram"])
    for bin in lengths["histogram"]:
        bar = "█" * max(round(_BAR * bin["rows"] / most), 1 if bin["rows"] else 0)
        span = f"{bin['from']:,}" if bin["from"] == bin["to"] else f"{bin['from']:,}-{bin['to']:,}"
        table.add_row(Text(span, justify="right"), bar, f"{bin['rows']:,}")
    return table


def _summary(report: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    counts = report["counts"]
    shown = [k for k in _WORDS if counts.get(k) or k in ("read", "train", "held_out")]
    for name in shown:
        table.add_row(Text(f"{counts[name]:,}", justify="right"), _WORDS[name])
    table.add_row(
        Text(f"{counts['tokens']:,}", justify="right"),
        f"tokens an epoch, {report['supervised_share']:.1%} of them learnt",
    )
    for source in report["sources"] if len(report["sources"]) > 1 else ():
        share = source["rows"] / max(1, counts["train"])
        table.add_row(Text(f"{source['rows']:,}", justify="right"), Text(f"rows of {source['name']} ({share:.1%})"))
    table.add_row("", Text(f"chat template: {report['template']}"))
    return table
