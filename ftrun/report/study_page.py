"""A study as one HTML page: what was varied, what was found, the table of runs, the plots.

Nothing is fetched, nothing is a script. The same rows give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ftrun.report.plots.ink import Drawing
from ftrun.report.study_rows import (
    FIGURES,
    NOISE,
    Row,
    arranged,
    choices,
    effects,
    folded,
    keys,
    label,
    plain,
    ranked,
    read,
    varied,
)
from ftrun.report.study_summary import summary
from ftrun.report.study_table import Column, figure_columns, value_columns

_VALUES = 8  # of a key, in the headline
_COSTS = ("peak_bytes", "tokens_per_s", "trainable_params", "retention")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # whatever a text holds: nothing is fetched, nothing runs


def page(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    sentences: Sequence[str],
    objective: str = "loss",
    kind: str = "Study",
    others: Sequence[str] = (),
) -> str:
    """The page, to be written as UTF-8. sentences: paragraphs below the summary. kind: what it is of. others: figures
    that were aimed at beside the objective.

    Raises UserError where a study cannot be judged by the objective.
    """
    there = read(rows)
    css = Path(__file__).with_name("study_page.css").read_text(encoding="utf-8")
    words = [*summary(rows, objective), *map(plain, sentences)]
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        f'<head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(plain(name))}: {'a study' if kind == 'Study' else 'runs'}</title>",
        f"<style>\n{css}</style></head>",
        "<body><main>",
        *_head(name, there, kind),
        *_summary(words, any(ranked(there, objective))),
        *_table(folded(there), objective),
        *_plots(there, objective, [key for key in (*others, *_COSTS) if key != objective]),
        *_each(there, objective),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _head(name: str, rows: Sequence[Row], kind: str) -> Iterator[str]:
    yield f'<header><p class="kind">{kind} of {len(rows)} run{"" if len(rows) == 1 else "s"}</p>'
    yield f"<h1>{escape(plain(name))}</h1>"
    shown = [f"<b>{escape(key)}</b> {escape(_listed(choices(rows, key)))}" for key in varied(rows)]
    if shown:
        verb = "Varied" if len(rows) > 1 else "Set"
        yield f'<p class="varied">{verb}: {"; ".join(shown)}</p>'
    yield "</header>"


def _listed(values: Sequence[str]) -> str:
    if len(values) <= _VALUES:
        return ", ".join(values)
    return f"{', '.join(values[: _VALUES - 2])}, … {values[-1]} ({len(values)} values)"


def _summary(words: Sequence[str], judged: bool) -> Iterator[str]:
    """The sentences; the best run's, the second, stands out."""
    yield '<section class="summary" aria-label="Summary">'
    for number, sentence in enumerate(words):
        lead = ' class="lead"' if judged and number == 1 else ""
        yield f"<p{lead}>{escape(sentence)}</p>"
    yield "</section>"


def _table(rows: Sequence[Row], objective: str) -> Iterator[str]:
    """The runs, best first. What is the same in all stands below it."""
    if not rows:
        return
    there = arranged(rows, objective)
    settings = [c for c in value_columns(there) if c.key in varied(there)]
    notes = tuple(row.note for row in there)
    settings += [Column("", "note", notes, False)] if any(notes) else []
    figures = figure_columns(there, objective)
    shown = [c for c in figures if c.key == objective or not c.constant]
    yield '<section><h2>Runs</h2><div class="scroll" tabindex="0" role="region" aria-label="Table of runs">'
    yield f'<table><thead><tr><th class="right" scope="col">#</th>{"".join(map(_heading, settings))}'
    heads = "".join(map(_heading, shown)) or '<th scope="col">reason</th>'
    yield f'<th scope="col">status</th>{heads}</tr></thead><tbody>'
    best = next(iter(ranked(there, objective)), None)
    for index, row in enumerate(there):
        yield _line(row, index, settings, shown, row is best)
    yield "</tbody></table></div>"
    same = [f"{key}={choices(there, key)[0]}" for key in keys(there) if key not in varied(there)]
    same += [f"{c.head} {next(filter(None, c.cells))}" for c in figures if c not in shown]
    if same:
        yield f'<p class="note">The same in all: {escape(", ".join(same))}</p>'
    yield "</section>"


def _heading(column: Column) -> str:
    kind = "value" if not column.right else "right wide" if " " in column.head else "right"
    return f'<th scope="col" class="{kind}">{escape(column.head)}</th>'


def _right(column: Column) -> str:
    return ' class="right"' if column.right else ' class="value"'


def _line(row: Row, index: int, settings: Sequence[Column], shown: Sequence[Column], best: bool) -> str:
    """A row of the table. The reason of a run that came to nothing stands in the place of its figures."""
    values = "".join(f"<td{_right(c)}>{escape(c.cells[index])}</td>" for c in settings)
    figures = "".join(f'<td class="right">{escape(c.cells[index])}</td>' for c in shown)
    instead = not shown or bool(row.reason and not row.done)
    if instead:
        figures = f'<td class="why" colspan="{max(1, len(shown))}">{escape(row.reason)}</td>'
    kind = "best" if best else "" if row.done or row.open else "out"
    note = f"<small>{escape(row.reason)}</small>" if row.reason and not instead else ""
    numbers = escape(row.name)
    if row.links or row.command:
        numbers = ", ".join(f'<a href="#run-{n}">{n}</a>' for n in row.of or (row.number,))
    number = f'<th class="right" scope="row">{numbers}</th>'
    status = f'<td class="status">{escape("best" if best else row.words)}{note}</td>'
    return f'<tr class="{kind}">{number}{values}{status}{figures}</tr>'


def _plots(rows: Sequence[Row], objective: str, costs: Sequence[str]) -> Iterator[str]:
    """The sections of plots; of a section without any not even its head. costs: what the objective is drawn against."""
    from ftrun.report.plots import ink, keys, memory, runs, trade
    from ftrun.report.plots.grid import heat

    means = folded(rows)
    order = dict.fromkeys([*effects(rows, objective), *varied(rows)])
    shown = [key for key in order if key != NOISE or len(order) == 1]
    with ink.style():
        sections = {
            "What the settings do, and what they cost": [
                *(keys.against(rows, key, objective) for key in shown),
                heat(means, objective),
                *(trade.trade(means, key, objective) for key in dict.fromkeys(costs)),
            ],
            "Within the runs": [
                memory.peaks(rows, objective),
                runs.training(rows, objective),
                runs.held_out(rows, objective),
                runs.ranks(rows, objective),
                runs.latency(rows, objective),
            ],
        }
    for head, drawings in sections.items():
        drawn = [drawing for drawing in drawings if drawing]
        if drawn:
            yield f'<section><h2>{head}</h2><div class="plots">{"".join(map(_figure, drawn))}</div></section>'


def _each(rows: Sequence[Row], objective: str) -> Iterator[str]:
    """What is to be had of every run: its figures, its files, the command that repeats it."""
    if not any(row.links or row.command for row in rows):
        return
    yield '<section><h2>Each run</h2><div class="scroll runs" tabindex="0" role="region" aria-label="Each run">'
    for row in arranged(rows, objective):
        head = f"{escape(label(row, varied(rows)))} <span>{escape(row.words)} {escape(row.shown(objective))}</span>"
        yield f'<details id="run-{row.number}"><summary><b>{row.number}</b> {head}</summary>'
        yield from (f"<p>{escape(words)}</p>" for words in (row.note, row.reason) if words)
        figures = [f"{FIGURES[key].label} {row.shown(key)}" for key in FIGURES if row.shown(key)]
        yield f"<p>{escape('; '.join(figures))}</p>" if figures else ""
        links = " ".join(f'<a href="{escape(at)}">{escape(plain(name))}</a>' for name, at in row.links.items())
        yield f'<p class="files">{links}</p>' if links else ""
        yield f"<p>Again: <code>{escape(row.command)}</code></p>" if row.command else ""
        yield "</details>"
    yield "</div></section>"


def _figure(drawing: Drawing) -> str:
    caption = f"<figcaption>{escape(drawing.caption)}</figcaption>" if drawing.caption else ""
    wide = ' class="wide"' if drawing.wide else ""
    return f"<figure{wide}><h3>{escape(drawing.title)}</h3>{drawing.legend}{drawing.svg}{caption}</figure>\n"
