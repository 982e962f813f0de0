"""Answer prompts with a run's tuned model, and with its base beside it.

  ftrun generate run=runs/one prompt="…"
  ftrun generate run=runs/one
  ftrun generate run=runs/one prompts=asked.jsonl out=answered.jsonl
  ftrun generate 'adapters={math: runs/a, chat: runs/b}' prompt="…" adapter=math
  ftrun generate 'adapters={math: runs/a, chat: runs/b}' \\
                 'blend={math: 0.7, chat: 0.3}' out=blended

The first gives both answers, the tuned one as it is written; the second is a conversation, or takes a prompt from a
pipe; the third answers a file's in batches.

Of several adapters on one base each prompt of a file names its own by `adapter` ("base" is the untuned model), and
one batch holds them all; a single prompt that names none is answered by each. A blend is the weighted sum of LoRA
updates; without prompts=FILE it is saved in out as a run's folder, which the other verbs take, and PEFT its adapter/.
seed=N draws other answers at a temperature.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftrun.errors import UserError, unknown
from ftrun.job import Job
from ftrun.runs import check_finished
from ftrun.schema import option
from ftrun.tasks.pace import Pace
from ftrun.train.interrupt import Terminated

if TYPE_CHECKING:
    from ftrun.evals.generation import Answer, Sampling
    from ftrun.tasks.prompts import Prompt
    from ftrun.tasks.speakers import Speakers

_BATCH_ROWS = 8
_HELP = "Ctrl-C stops an answer, /reset forgets what was said, /exit or Ctrl-D ends"


@dataclass(frozen=True)
class Options:
    """What this verb takes besides the job's keys."""

    run: str | None = option(None, "the folder of a finished run")
    prompt: str | None = option(None, "what is asked; null: a conversation, or what a pipe holds")
    prompts: str | None = option(None, "a file of prompts: .jsonl (prompt or messages, adapter), or one a line")
    out: str | None = option(None, "where the answers to prompts=FILE go (.jsonl), or the folder of a blend")
    adapters: dict[str, str] = option({}, "several runs on one base by names of yours: {math: runs/a, chat: runs/b}")
    adapter: str | None = option(None, "whose answer: a name of adapters, or base; null: everyone's")
    blend: dict[str, float] = option({}, "the adapters' updates as one, by weights: {math: 0.7, chat: 0.3}")
    blend_rank: int | None = option(None, "best approximation of the blend at this rank; null: exactly", ge=1)
    scale: float = option(1.0, "how much of the update: 1 as trained, 0 the base")
    base: bool | None = option(None, "the base's answer beside it; null: to one prompt, not to a file's")
    raw: bool = option(False, "the prompt as it stands, without the chat template")
    max_new_tokens: int = option(256, "tokens of an answer at most", ge=1)
    temperature: float = option(0.0, "0: the likeliest token; above: drawn, the evener the higher", ge=0)
    top_p: float = option(1.0, "draw from the likeliest tokens that have this probability together", gt=0, le=1)
    top_k: int = option(0, "draw from so many likeliest tokens; 0: from all", ge=0)
    batch_rows: int | None = option(None, "prompts of a file at once; null: 8", ge=1)
    format: str = option("text", "text, or json: one object on standard output", choices=("text", "json"))

    def __post_init__(self) -> None:
        if self.run is not None and self.adapters:
            raise UserError("run and adapters: give one of them; adapters={NAME: DIR} takes one run as well")
        if self.prompt is not None and self.prompts is not None:
            raise UserError("prompt and prompts: give one of them")
        if self.prompt == "":
            raise UserError("prompt=: holds nothing to answer")
        if self.blend and not self.adapters:
            raise UserError("blend: needs adapters={NAME: DIR, …}, whose names it weighs")
        if self.blend_rank is not None and not self.blend:
            raise UserError(f"blend_rank={self.blend_rank}: needs blend={{NAME: WEIGHT, …}}")
        if self.out is not None and self.prompts is None and not self.blend:
            raise UserError(f"out={self.out}: needs prompts=FILE, whose answers go there, or a blend to save")
        if self.batch_rows is not None and self.prompts is None:
            raise UserError(f"batch_rows={self.batch_rows}: needs prompts=FILE, of which so many run at once")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise UserError("top_p and top_k: have no effect with temperature=0; set a temperature above 0")


def run(job: Job, **options: Any) -> int:
    """Print or write the answers; returns 0."""
    asked = Options(**options)
    for folder in filter(None, (asked.run, *asked.adapters.values())):
        check_finished(Path(folder))
    return Answering(job, asked).run()


class Answering:
    """One call of the verb."""

    def __init__(self, job: Job, options: Options) -> None:
        from ftrun.evals.generation import Sampling

        self.job, self.options = job, options
        self.how: Sampling = Sampling(options.temperature, options.top_p, options.top_k, job.seed)
        self.asked = self._read()
        self.speakers = self._open()
        if options.adapter is not None:
            self._check(options.adapter, "adapter")

    def run(self) -> int:
        o = self.options
        if o.blend:
            self._blended()
            if o.out is not None and o.prompts is None and o.prompt is None:
                return 0
        if o.prompts is not None:
            self._file()
        elif self.asked:
            self._one(self.asked[0])
        else:
            self._talk()
        return 0

    # --- what is asked, and whom ---

    def _read(self) -> list[Prompt]:
        """What is asked, read before anything heavy is opened; [] for a conversation, or where a blend is saved."""
        from ftrun.tasks.prompts import Prompt, read

        o = self.options
        self._check_out()
        if o.prompts is not None:
            return read(Path(o.prompts).expanduser(), o.adapter)
        if o.prompt is not None:
            return [Prompt.of(o.prompt, o.adapter)]
        if o.blend and o.out is not None:
            return []
        if sys.stdin.isatty():
            for word, given in (("base=true", o.base), ("format=json", o.format == "json")):
                if given:
                    raise UserError(f"{word}: has no effect in a conversation; give prompt='…' or prompts=FILE")
            return []
        if text := sys.stdin.read().strip():
            return [Prompt.of(text, o.adapter)]
        raise UserError("prompt is missing, and standard input holds none: prompt='…', or prompts=FILE")

    def _check_out(self) -> None:
        from ftrun.runs import check_place

        o = self.options
        if o.out is None:
            return
        if os.path.exists(o.out):  # a name that is too long is no file, and no error yet
            what = "folder for the blend" if o.prompts is None else "file for the answers"
            raise UserError(f"out={o.out}: is there already; name another {what}")
        check_place(Path(o.out))

    def _open(self) -> Speakers:
        from ftrun.tasks.speakers import One, Several

        o = self.options
        if o.adapters:
            return Several(o.adapters, self.job, o.scale, o.blend, o.blend_rank, _say)
        assert o.run is not None
        return One(Path(o.run), self.job, o.scale, _say)

    def _check(self, name: str, where: str) -> str:
        from ftrun.tasks.prompts import BASE

        if name not in (*self.speakers.names, BASE):
            raise UserError(unknown(f"{where}: the adapter", name, [*self.speakers.names, BASE]))
        return name

    def _whose(self, prompt: Prompt, beside: bool) -> list[str]:
        """Those who answer a prompt, the base last where it stands beside them."""
        from ftrun.tasks.prompts import BASE

        names = [self._check(prompt.adapter, prompt.where)] if prompt.adapter is not None else [*self.speakers.names]
        return names + ([BASE] if beside and BASE not in names else [])

    # --- ways to answer ---

    def _one(self, prompt: Prompt) -> None:
        """One prompt: everyone's answer one after another, as it is written."""
        names = self._whose(prompt, self.options.base is not False)
        if self.options.format == "json":
            found = self._answers([(name, prompt) for name in names])
            print(json.dumps({**prompt.given, "answers": dict(zip(names, map(_row, found), strict=True))}))
            return
        width = max(map(len, names))
        for name in names:
            print(f"{name:{width}}  ", end="")
            self._stream(name, prompt, " " * (width + 2))

    def _stream(self, name: str, prompt: Prompt, indent: str = "") -> str:
        """Prints an answer as it is written; gives the whole of it."""
        from ftrun.evals.generation import pieces

        ids, said = self.speakers.ids(name, prompt, self.options.raw), ""
        with self.speakers.speaking([name]) as meet:
            tokens, tokenizer = self.options.max_new_tokens, self.speakers.tokenizer
            try:
                for piece in pieces(self.speakers.model, tokenizer, ids, tokens, self.how, meet):
                    shown = piece if said else piece.lstrip()
                    print(shown.replace("\n", f"\n{indent}"), end="", flush=True)
                    said += shown
            finally:
                print(flush=True)  # what is said of an interruption stands on a line of its own
        return said

    def _file(self) -> None:
        """Every prompt of the file, in batches of rows of about one length; written in the file's order."""
        from ftrun.tasks.prompts import BASE

        o = self.options
        wanted = [(row, name) for row, p in enumerate(self.asked) for name in self._of_row(p)]
        found = self._answers([(name, self.asked[row]) for row, name in wanted], [row for row, _ in wanted])
        lines: list[dict[str, Any]] = [dict(prompt.given) for prompt in self.asked]
        for (row, name), answer in zip(wanted, found, strict=True):
            beside = name == BASE and "answer" in lines[row]
            lines[row] |= {"base": answer.text} if beside else {"adapter": name, "answer": answer.text, **_row(answer)}
        text = "".join(_line(line) + "\n" for line in lines)
        if o.out is not None:
            _write(Path(o.out), text)
            _say(f"{len(lines)} answers in {o.out}")
        elif o.format == "json":
            print(json.dumps({"answers": lines}, ensure_ascii=False))
        else:
            print(text, end="")

    def _of_row(self, prompt: Prompt) -> list[str]:
        names = self._whose(prompt, bool(self.options.base))
        if prompt.adapter is None and len(self.speakers.names) > 1:
            known = ", ".join([*self.speakers.names, "base"])
            raise UserError(f"{prompt.where}: names no adapter; expected `adapter` in the row, or adapter=: {known}")
        return names

    def _answers(self, asked: Sequence[tuple[str, Prompt]], numbers: Sequence[int] | None = None) -> list[Answer]:
        """The answers in the order asked. numbers: what each one's draws depend on beside the seed."""
        from ftrun.evals.generation import answers

        rows = [self.speakers.ids(name, prompt, self.options.raw) for name, prompt in asked]
        found: dict[int, Answer] = {}
        pace = Pace(_say, "{done} of {whole} answers", len(asked))
        for batch in self._batches([name for name, _ in asked], rows):
            with self.speakers.speaking([asked[i][0] for i in batch]) as meet:
                made = answers(
                    self.speakers.model,
                    self.speakers.tokenizer,
                    [rows[i] for i in batch],
                    self.options.max_new_tokens,
                    self.how,
                    meet,
                    [0 if numbers is None else numbers[i] for i in batch],
                )
            found |= dict(zip(batch, made, strict=True))
            pace.add(len(batch))
        return [found[i] for i in range(len(asked))]

    def _batches(self, names: Sequence[str], rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Rows of about one length; within a batch one speaker's beside each other, alone where they must be."""
        groups, count = [list(range(len(rows)))], self.options.batch_rows or _BATCH_ROWS
        if not self.speakers.together:
            groups = [[i for i, name in enumerate(names) if name == one] for one in dict.fromkeys(names)]
        for group in groups:
            ordered = sorted(group, key=lambda i: len(rows[i]))
            for start in range(0, len(ordered), count):
                yield sorted(ordered[start : start + count], key=lambda i: names[i])

    def _talk(self) -> None:
        """A conversation: what was said before is asked again with each new question."""
        from ftrun.tasks.prompts import Prompt

        names = [self.options.adapter] if self.options.adapter else self.speakers.names
        if len(names) > 1:
            raise UserError(f"adapter is missing: a conversation is with one of {', '.join([*names, 'base'])}")
        _say(_HELP)
        said: list[dict[str, str]] = []
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                print()
                return
            if text == "/exit":
                return
            if text == "/reset":
                said = []
            elif text.startswith("/"):
                _say(f"{text}: no such command. {_HELP}")
            elif text:
                said = self._turn(names[0], [*said, {"role": "user", "content": text}], said, Prompt)

    def _turn(self, name: str, asked: list[dict[str, str]], before: list[dict[str, str]], make: Any) -> Any:
        """The conversation with its answer; as it was before where the model has no room for it."""
        try:
            answer = self._stream(name, make(asked, "the conversation"))
        except UserError as error:
            _say(f"{error}. /reset begins anew")
            return before
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated):
                raise
            _say(f"stopped: the question and what there is of its answer are forgotten. {_HELP}")
            return before
        return [*asked, {"role": "assistant", "content": answer}]

    def _blended(self) -> None:
        from ftrun.tasks.speakers import Several

        o, speakers = self.options, self.speakers
        assert isinstance(speakers, Several)
        assert speakers.blend is not None
        made = speakers.blend
        _say(f"blend: rank {made.rank}, {made.kept:.2%} of the update (its Frobenius norm squared)")
        if o.out is not None and o.prompts is None:
            record = speakers.save(Path(o.out), o.blend, o.scale)
            _say(f"blend: in {o.out}, a run's folder: ftrun generate run={o.out} …")
            if o.format == "json" and o.prompt is None:
                print(json.dumps({"out": o.out, **record}, ensure_ascii=False))


def _row(answer: Answer) -> dict[str, Any]:
    """An answer's JSON: its text, its tokens, and whether it came to its end."""
    return {"answer": answer.text, "tokens": len(answer.ids), "ended": answer.ended}


def _line(row: dict[str, Any]) -> str:
    """JSON in readable letters; escaped where a row holds half a surrogate pair, which no file takes."""
    from ftrun.tasks.prompts import encodable

    text = json.dumps(row, ensure_ascii=False)
    return text if encodable(text) else json.dumps(row)


def _write(out: Path, text: str) -> None:
    """Whole or not at all. Where it cannot be written the text goes to standard output, and UserError says so."""
    from ftrun.runs import aside

    try:
        with aside(out) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        print(text, end="", flush=True)
        raise UserError(
            f"out={out}: cannot be written: {error.strerror or error}; the answers are on standard output"
        ) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr)
