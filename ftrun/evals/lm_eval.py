"""Tasks of lm-evaluation-harness (Gao et al.), asked of a model in memory; pip install 'ftrun[lm_eval]'."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ftrun.errors import UserError
from ftrun.schema import option


@dataclass(frozen=True)
class Options:
    """Which tasks, and how much of them. They are asked at the end of a run, or by ftrun eval."""

    evaluates: ClassVar[bool] = False  # the loop has no held-out loss of it
    tasks: list[str] = option([], "tasks of the harness, as [arc_easy,hellaswag]; ftrun eval: tasks=arc_easy,hellaswag")
    limit: int | None = option(None, "documents of each task at most; null: all of them", ge=1)
    shots: int | None = option(None, "examples in front of each document; null: each task's own", ge=0)
    batch: int = option(8, "documents at once", ge=1)
    include_path: str | None = option(None, "folder with task files of your own; they may run Python of that folder")

    def check(self) -> None:
        """UserError where the harness is not installed, or the folder is not there."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("eval=lm_eval: lm-evaluation-harness is not installed; pip install 'ftrun[lm_eval]'")
        if self.include_path is not None and not Path(self.include_path).expanduser().is_dir():
            raise UserError(f"eval.include_path={self.include_path}: no such folder; expected one with task files")


def check_tasks(options: Options) -> Any:
    """The harness's manager of tasks. UserError where none is named, or one that it does not know."""
    from lm_eval.tasks import TaskManager

    from ftrun.errors import unknown

    if not options.tasks:
        raise UserError("eval=lm_eval: names no task; tasks=arc_easy,hellaswag, or eval.tasks=[arc_easy,hellaswag]")
    path = options.include_path and str(Path(options.include_path).expanduser())
    manager = TaskManager(include_path=path)
    for name in options.tasks:
        if not manager.match_tasks([name]):
            raise UserError(unknown("tasks: the harness has no task", name, manager.all_tasks))
    return manager


def ask(model: Any, tokenizer: Any, options: Options, manager: Any, seed: int) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of a model that is a transformers one. The caller sees to attention, autocast and scale.

    Raises UserError where a task's documents cannot be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch)
    try:
        found = lm_eval.simple_evaluate(
            model=asked,
            tasks=list(options.tasks),
            num_fewshot=options.shots,
            limit=options.limit,
            task_manager=manager,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (ConnectionError, OSError) as error:
        raise UserError(
            f"eval=lm_eval: a task's documents cannot be had: {str(error).splitlines()[0][:200]}"
        ) from error
    return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The harness's names "acc,none" without their filter where it is none; standard errors left out."""
    named = {key.removesuffix(",none"): value for key, value in values.items() if "_stderr" not in key}
    numbers = (int, float)
    return {k: float(v) for k, v in named.items() if isinstance(v, numbers) and not isinstance(v, bool)}


def names(tasks: str | Sequence[str]) -> list[str]:
    """Tasks as a user names them: a list, or with commas between."""
    return [one.strip() for one in (tasks.split(",") if isinstance(tasks, str) else tasks) if one.strip()]
