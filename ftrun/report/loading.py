"""The card's last part: how what was learnt is loaded by PEFT, by transformers once it is merged, and by vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftrun.report.card import Facts

# vLLM, config/lora.py: what max_lora_rank may be; 16 unless it is said
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_RANK = 16

_ANSWER = """\
prompt = "Hello"
if tokenizer.chat_template:
    turns = [{"role": "user", "content": prompt}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
answer = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


def loading(facts: Facts) -> str:
    """The three ways, or why one of them is closed."""
    if facts.whole:
        return "\n\n".join(["### transformers", _python(_whole(facts.place)), "### vLLM", _serve(facts.place)])
    where = ["From the run's folder:"] if facts.place == "adapter" else []
    parts = [*where, "### PEFT", _peft(facts), "### transformers, merged", _merged(facts), "### vLLM", _vllm(facts)]
    return "\n\n".join(parts)


def vllm_trouble(config: Mapping[str, Any]) -> str | None:
    """Why vLLM does not load an adapter of this adapter_config.json; None where it does.

    Its rules (vllm/lora/peft_helper.py and its parser of tensor names): LoRA alone, no DoRA, no modules_to_save, no
    biases, one scale for all modules, a rank within max_lora_rank, and only modules that its layers know by their last
    names: linear layers of the decoder.
    """
    if config.get("peft_type") != "LORA":
        return f"it loads LoRA alone, not {config.get('peft_type') or 'this method'}"
    reasons = [
        (config.get("use_dora"), "it does not load DoRA"),
        (config.get("modules_to_save"), "it takes no modules_to_save"),
        (config.get("bias", "none") != "none", "it takes no biases"),
        (config.get("rank_pattern") or config.get("alpha_pattern"), "it takes one rank and alpha for all modules"),
        (config.get("target_parameters"), "it takes no updates of experts that are kept as one tensor"),
        (int(config.get("r", 0)) > VLLM_RANKS[-1], f"it takes ranks up to {VLLM_RANKS[-1]}"),
        (
            any(n.endswith(("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")) for n in targets(config)),
            "its support of updates of the embedding and the head differs between versions and models",
        ),
    ]
    return next((why for found, why in reasons if found), None)


def targets(config: Mapping[str, Any]) -> list[str]:
    """The target modules as a list of names."""
    found = config.get("target_modules") or []
    return [found] if isinstance(found, str) else list(found)


def _peft(facts: Facts) -> str:
    if facts.method not in ("lora", "dora", "prompt"):
        return f"PEFT has no {facts.method}: ftrun alone runs it (`ftrun generate run=DIR prompt=…`)."
    if facts.job["model"].get("new_tokens"):
        return "The job added tokens to the vocabulary, whose first embeddings PEFT does not know: merge it, as below."
    quantised, note = _quantisation(facts)
    imports = ["import torch", "from peft import PeftModel"]
    names = ["AutoModelForCausalLM", "AutoTokenizer", *(["BitsAndBytesConfig"] if quantised else [])]
    lines = [
        *imports,
        f"from transformers import {', '.join(names)}",
        "",
        *([f"quantised = {quantised}"] if quantised else []),
        f"base = AutoModelForCausalLM.from_pretrained({_arguments(facts, bool(quantised))})",
        f'model = PeftModel.from_pretrained(base, "{facts.place}").eval()',
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.base}")',
        _ANSWER,
    ]
    return "\n\n".join([*_notes(facts, note), _python("\n".join(lines))])


def _notes(facts: Facts, note: str) -> list[str]:
    found = [note] if note else []
    if facts.result["base"]["source"] == "package":
        found.append(
            "It was trained on the weights of the package, which are not quite the hub's: beside those the tuned model "
            "differs a little from what was measured."
        )
    if not facts.on_hub:
        found.append(f"`{facts.base}` stands for the folder of the base.")
    return found


def _arguments(facts: Facts, quantised: bool) -> str:
    revision = facts.result["base"].get("revision")
    given = [f'"{facts.base}"', f"dtype=torch.{facts.result['base']['dtype']}"]
    given += [f'revision="{revision}"'] if revision else []
    return ", ".join([*given, *(["quantization_config=quantised"] if quantised else [])])


def _quantisation(facts: Facts) -> tuple[str | None, str]:
    """(the config by which transformers stores the base as the run did, a sentence where it cannot)."""
    quant = facts.job["quant"]
    kind = quant["kind"]
    if kind == "none" or facts.result["base"].get("stored_as") == "bitsandbytes 4-bit":
        return None, ""
    if kind not in ("nf4", "fp4") or quant.get("block_size", 64) != 64:
        return None, (
            f"The run stored the base as {facts.result['base']['quantisation']}, which transformers cannot: beside the "
            "plain base the tuned model differs a little from what was measured."
        )
    dtype = facts.result["base"]["dtype"]
    skip = quant.get("skip") or []
    skipped = f", llm_int8_skip_modules={['lm_head', *skip]!r}".replace("'", '"') if skip else ""
    double = f"bnb_4bit_use_double_quant={bool(quant.get('double_quant', True))}"
    return (
        f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{kind}", {double}, '
        f"bnb_4bit_compute_dtype=torch.{dtype}{skipped})",
        "",
    )


def _merged(facts: Facts) -> str:
    if facts.method in ("prompt", "houlsby"):
        return f"method={facts.method} cannot be merged into the base."
    into = "" if facts.job["quant"]["kind"] == "none" else " into=dequantised"
    command = f"```bash\nftrun merge run={facts.name} out=merged{into}\n```"
    return f"Where the run's folder `{facts.name}` lies:\n\n{command}\n\n{_python(_whole('merged'))}"


def _whole(place: str) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto").eval()',
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
        _ANSWER,
    ]
    return "\n".join(lines)


def _vllm(facts: Facts) -> str:
    trouble = vllm_trouble(facts.config)
    if trouble is None and facts.job["model"].get("new_tokens"):
        trouble = "the job added tokens to the base's vocabulary"
    if trouble is not None:
        merges = facts.method in ("lora", "dora")
        return f"vLLM does not load this adapter: {trouble}." + (f" Merged:\n\n{_serve('merged')}" if merges else "")
    rank = next(one for one in VLLM_RANKS if one >= int(facts.config["r"]))
    more = f" --max-lora-rank {rank}" if rank != _VLLM_RANK else ""
    more += " --quantization bitsandbytes" if facts.job["quant"]["kind"] == "nf4" else ""
    command = f"vllm serve {facts.base} --enable-lora{more} --lora-modules {facts.name}={facts.place}"
    return f"```bash\n{command}\n```"


def _serve(place: str) -> str:
    return f"```bash\nvllm serve {place}\n```"


def _python(code: str) -> str:
    return f"```python\n{code}\n```"
