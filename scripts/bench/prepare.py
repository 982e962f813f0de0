"""The rows of a case, written once for both sides: a program of its own, since it needs torch.

    python -m scripts.bench.prepare JSON    {case, steps, held_out, rows, out, model}

out/train.jsonl is for ftrun, which draws the rows of each step from it by its own order. out/peer.jsonl holds the same
rows in that order, for a peer that takes them one after another, as token ids and which are learnt: TRL's own reading
of a conversation learns one token more, the line end behind an answer's last. out/held_out.jsonl is the like;
out/facts.json says what each step takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftrun import assemble, stepping
from ftrun.compose import compose
from ftrun.data.load import Corpus
from ftrun.data.rows import Rows
from ftrun.data.shapes import Chat, read
from ftrun.data.sources import KINDS, parts
from ftrun.data.template import adds_bos
from ftrun.errors import UserError
from ftrun.runs import cache_dir
from scripts.bench import sides
from scripts.bench.cases import CASES, SEQ_LEN, Case

Row = dict[str, Any]  # a line of train.jsonl
_CUTS, _FILLERS = 64, (" a", "a")  # places at which a text is tried to be cut, and what fills it up


def prepare(case: Case, steps: int, held_out: int, rows: str | None, out: Path, model: str | None) -> None:
    """Write the files of a case into `out`. rows: a file of the user's, else the bundled conversations.

    Raises UserError where the data are too few.
    """
    wanted = steps * case.batch
    tokenizer = _tokenizer(model)
    found = list(conversations(rows))
    lines = _short(found, tokenizer) if case.data == "rows" else list(full(found, tokenizer, wanted + held_out))
    if len(lines) < wanted + held_out:
        raise UserError(
            f"{rows or 'the bundled data'}: {len(lines):,} rows of one question and one answer within {SEQ_LEN} "
            f"tokens; {steps} steps of {case.batch} rows and {held_out} held out need {wanted + held_out:,}"
        )
    _write(out / "train.jsonl", lines[:wanted])
    _write(out / "apart.jsonl", lines[wanted : wanted + held_out])
    _hand_out(case, steps, out, model)


def conversations(rows: str | None) -> Iterator[list[Row]]:
    """Each different conversation of one question and one answer, as messages, in the file's order."""
    kind = next((k for k in KINDS if rows and rows.removesuffix(".gz").endswith(f".{k}")), "jsonl")
    job = compose([f"data={kind}", f"data.path={Path(rows).expanduser().absolute()}"] if rows else [])
    options, seen = job.data.typed(), set()
    for part in parts(job.data.load(), options):
        for where, record in part.records():
            if not isinstance(record, dict):
                raise UserError(f"{where}: {record.why}")
            shape = read(record, options)
            turns = shape.messages if isinstance(shape, Chat) else []
            words = tuple(m["content"] for m in turns)
            if [m["role"] for m in turns] == ["user", "assistant"] and words not in seen:
                seen.add(words)
                yield [{"role": m["role"], "content": m["content"]} for m in turns]


def _short(found: Sequence[list[Row]], tokenizer: Any) -> list[Row]:
    """The conversations that need no cutting."""
    made = (tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False) for turns in found)
    return [{"messages": turns} for turns, ids in zip(found, made, strict=True) if len(ids) <= SEQ_LEN]


def full(found: Sequence[list[Row]], tokenizer: Any, count: int) -> Iterator[Row]:
    """Texts of exactly SEQ_LEN tokens, EOS counted, out of the conversations one after another, again where too few."""
    size = SEQ_LEN - 1 - adds_bos(tokenizer)
    text = "\n\n".join(turn["content"] for turns in found for turn in turns)
    start = 0
    for _ in range(count):
        piece = (text[start:] + "\n\n" + text)[: 12 * size]
        ids, ends = _tokens(piece, tokenizer)
        # a cut may change the tokens before it, and a filler may be more than one: what comes out decides
        tried = ((n, f) for n in range(min(size, len(ids)), max(0, size - _CUTS), -1) for f in _FILLERS)
        texts = ((ends[n - 1], piece[: ends[n - 1]] + f * (size - n)) for n, f in tried)
        end, exact = next(((e, t) for e, t in texts if len(_tokens(t, tokenizer)[0]) == size), (0, None))
        if exact is None:
            raise UserError(f"the data: found no text of {SEQ_LEN} tokens")
        start = (start + end) % len(text)
        yield {"text": exact}


def _tokens(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids, where each ends in the text)."""
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return made["input_ids"], [end for _, end in made["offset_mapping"]]


def _hand_out(case: Case, steps: int, out: Path, model: str | None) -> None:
    """What the other programs read, by ftrun's own reading of the files."""
    job = compose([*sides.overrides(case.ours, case, steps, out, model), f"data.held_out_path={out / 'apart.jsonl'}"])
    sketch = assemble.sketch(job, cache_dir(), print, whole=True)
    corpus = assemble.rows(job, sketch, cache_dir(), print)
    if len(corpus.train) != steps * case.batch:
        raise UserError(f"{out / 'train.jsonl'}: {len(corpus.train):,} rows are left of {steps * case.batch:,}")
    taken = [_step(job, corpus, step) for step in range(steps * case.epochs)]
    _write(out / "peer.jsonl", [_ids(corpus.train, row) for rows in taken for row in rows])
    _write(out / "held_out.jsonl", [_ids(corpus.held_out, row) for row in range(len(corpus.held_out))])
    facts = {
        "model": str(sketch.base.folder),
        "tokens": [int(corpus.train.lengths[rows].sum()) for rows in taken],
        "supervised": [int(corpus.train.supervised[rows].sum()) for rows in taken],
    }
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _step(job: Any, corpus: Corpus, step: int) -> list[int]:
    return stepping.batching.step_rows(len(corpus.train), job.batch, step, job.seed)


def _ids(rows: Rows, row: int) -> Row:
    """A row as TRL takes one that is tokenised."""
    return {"input_ids": rows.ids(row).tolist(), "completion_mask": rows.learn(row).tolist()}


def _tokenizer(model: str | None) -> Any:
    job = compose([f"model.path={model}"] if model else [])
    return assemble.sketch(job, cache_dir(), print, whole=True).base.tokenizer()


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    """Run as a program; returns the exit code."""
    asked = json.loads(sys.argv[1])
    try:
        prepare(CASES[asked.pop("case")], **{**asked, "out": Path(asked["out"])})
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
