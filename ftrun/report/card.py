"""A run's card: README.md as the hub reads it, with what was trained on what, how, to what effect, and how to load it.

Pure: from the run's job, result and provenance to text. A place of the machine it ran on never enters it: a folder that
was given by its whole path is called by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml

from ftrun.report.loading import loading
from ftrun.report.plan_text import size

# identifiers of licences that the hub knows, of those that model files name
_LICENSES = ("apache-2.0", "mit", "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "openrail", "bsd")
_IN_PEFT = ("lora", "dora", "prompt")


@dataclass(frozen=True)
class Facts:
    """job: job.yaml's content. result: result.json's. config: adapter_config.json's, {} where there is no adapter.
    place: where the files to load lie, seen from the card: "adapter", "model", or a hub id. whole: whether they are a
    whole model, trained in full or merged.
    """

    job: Mapping[str, Any]
    result: Mapping[str, Any]
    config: Mapping[str, Any]
    place: str
    name: str
    whole: bool = False

    @property
    def base(self) -> str:
        """The base as others find it: a hub id, or the folder as it was given, never a whole path."""
        return shown(self.result["base"]["path"] if self.on_hub else self._given)

    @property
    def on_hub(self) -> bool:
        """Whether the base, or the model that a package's weights were made from, is on the hub."""
        return self.result["base"]["source"] in ("hub", "package")

    @property
    def _given(self) -> str:
        return str(self.job["model"].get("path") or self.result["base"]["path"])

    @property
    def method(self) -> str:
        """The method's kind: lora, full, …"""
        return str(self.job["method"]["kind"])


def card(facts: Facts) -> str:
    """The whole text, front matter first."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---", f"# {facts.name}", _summary(facts), "## Training", _training(facts)]
    parts += ["## Results", _results(facts), "## Memory", _memory(facts), "## Licence", _licence(facts)]
    return "\n\n".join([*parts, "## How to load it", loading(facts)]) + "\n"


def front_matter(facts: Facts) -> dict[str, Any]:
    """The metadata that the hub reads (huggingface_hub's ModelCardData)."""
    job, licence = facts.job, facts.result["base"].get("license")
    library = "transformers" if facts.whole else "peft" if facts.method in _IN_PEFT else "ftrun"
    quantised = [] if job["quant"]["kind"] == "none" else [job["quant"]["kind"]]
    made: dict[str, Any] = {
        "base_model": facts.base if facts.on_hub else None,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": licence if licence in _LICENSES or licence is None else "other",
        "license_name": None if licence in _LICENSES else licence,
        "tags": ["ftrun", facts.method, *quantised],
        "datasets": [job["data"]["path"]] if job["data"]["kind"] == "hub" else None,
        "metrics": ["perplexity"] if _after(facts) else None,
    }
    return {key: value for key, value in made.items() if value is not None}


def shown(path: str) -> str:
    """A path as a stranger may read it: as it was given where that is relative, else its name."""
    pure = PurePath(path)
    return pure.name if pure.is_absolute() or path.startswith("~") else str(path)


def _summary(facts: Facts) -> str:
    base, result = facts.result["base"], facts.result
    merged = " Merged into the base: a whole model." if facts.whole and facts.method != "full" else ""
    whence = {"hub": "from the hub", "package": f"as the package {base['package']} ships it", "folder": "a local model"}
    stored = f"; its weights are {base['stored_as']}" if base.get("stored_as") else ""
    revision = f", revision `{base['revision']}`" if base.get("revision") else ""
    lines = [
        f"`{facts.base}` ({whence[base['source']]}{revision}{stored}), tuned by "
        f"ftrun with method={facts.job['choices']['method']}: "
        f"{result['trainable_params']:,} of {result['total_params']:,} parameters trained.{merged}",
        f"The base's weights: sha256 `{base['hash']}`, {base['dtype']}, quantisation: {base['quantisation']}.",
    ]
    return "\n\n".join(lines)


def _training(facts: Facts) -> str:
    job, result = facts.job, facts.result
    data = job["data"]
    source = f" (`{shown(str(data['path']))}`)" if data.get("path") else ""
    rows = [
        ("data", f"{data['kind']}{source}, loss on {data.get('loss_on', 'all')}, {result['tokens']:,} tokens seen"),
        ("method", _options(job["method"], ("kind", "from", "dtype"))),
        ("optimiser", f"{job['optim']['kind']}, lr {float(job['lr']):g}"),
        ("steps", f"{result['steps']}, {job['batch']} rows each, at most {job['seq_len']} tokens a row"),
        ("seed", str(job["seed"])),
    ]
    return _table(("", ""), rows) + "\n\nThe same job again:\n\n```bash\nftrun job=job.yaml\n```"


def _options(values: Mapping[str, Any], left_out: tuple[str, ...]) -> str:
    kept = {k: v for k, v in values.items() if k not in left_out and v not in (None, [], {}, "", False)}
    return ", ".join([str(values["kind"]), *(f"{k} {v}" for k, v in kept.items())])


def _after(facts: Facts) -> Mapping[str, Any]:
    return (facts.result.get("eval") or {}).get("after") or {}


def _results(facts: Facts) -> str:
    """Before and after, where they were measured."""
    result = facts.result
    before, after = (result.get("eval") or {}).get("before") or {}, _after(facts)
    rows = []
    for key, words in (("loss", "held-out loss, nats a token"), ("perplexity", "held-out perplexity")):
        if key in after:
            rows.append((words, _number(before.get(key)), _number(after[key])))
    kept = result.get("retention")
    if kept:
        rows.append(
            ("loss on the base's own text (what tuning broke)", _number(kept["before"]), _number(kept["after"]))
        )
    parts = [_table(("", "base", "tuned"), rows)] if rows else ["Nothing was held out."]
    rank = result.get("effective_rank")
    if rank:
        parts.append(
            f"Effective rank of the updates: {rank['mean']:.1f} on average, {rank['lowest']:.1f} to "
            f"{rank['highest']:.1f}, of rank {rank['rank']}."
        )
    return "\n\n".join(parts)


def _memory(facts: Facts) -> str:
    memory = facts.result.get("memory") or {}
    planned, measured = memory.get("planned_peak_bytes"), memory.get("measured_peak_bytes")
    if planned is None or measured is None:
        return "The step that was planned for was not measured."
    return f"Training peak: {size(planned)} planned, {size(measured)} measured ({100 * memory['error']:+.2f} %)."


def _licence(facts: Facts) -> str:
    licence = facts.result["base"].get("license")
    if licence is None:
        return "The licence of the base is not on record; what is made of it stands under the base's terms."
    return f"The base stands under {licence}; what is made of it stands under its terms."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: Any) -> str:
    return "not measured" if value is None else f"{value:.4f}"
