"""The model card: README.md of an output directory, in the convention of the hub."""

from pathlib import Path

import nanoalign
from nanoalign.formats.peft import LoRAConfig
from nanoalign.formats.rows import on_hub
from nanoalign.run.files import write_text
from nanoalign.run.flags import Config


def write_card(
    cfg: Config,
    lora: LoRAConfig | None,
    directory: Path,
    examples: int,
    last: dict,
    stop_ids: list[int],
    given: dict | None = None,
) -> None:
    """`lora` is None when all weights trained; `last` is the last line of metrics.jsonl; at
    `stop_ids` a reply ends, which an adapter's base does not know; `given` went to the template."""
    package, opener = "transformers", "AutoModelForCausalLM"
    base, tag, trained = cfg.model_name_or_path, "", "all weights"
    if lora:
        package, opener = "peft", "AutoPeftModelForCausalLM"
        base, tag = lora.base_model_name_or_path or base, "\n- lora"
        trained = f"LoRA, r={lora.r}, alpha={lora.lora_alpha:g}"
    method = "supervised fine-tuning" if cfg.method == "sft" else cfg.method.upper()
    base_model, shown_base = f"base_model: {base}\n", base
    if not on_hub(base):  # a path of this machine says nothing there
        base_model, shown_base = "", Path(base).name
    named = [f"\n- {name}" for name in cfg.dataset_name if on_hub(name)]
    datasets = "".join(["datasets:", *named, "\n"]) if named else ""
    curve = "\n![curves](curves.png)\n" if (directory / "curves.png").exists() else ""
    more = "".join(f"    {name}={value!r},\n" for name, value in (given or {}).items())
    shown = {k: v for k, v in last.items() if k not in ("step", "time", "tokens_per_second")}
    text = f"""\
---
{base_model}library_name: {package}
pipeline_tag: text-generation
tags:
- {cfg.method}
- nanoalign{tag}
{datasets}---

# {directory.resolve().name}

{shown_base}, trained with {method} by nanoalign {nanoalign.__version__}.

| | |
|---|---|
| data | {", ".join(Path(name).name for name in cfg.dataset_name)}: {examples} examples |
| trained | {trained} |
| steps | {last.get("step", 0)}, learning rate {cfg.learning_rate:g}, seed {cfg.seed} |

Last metrics: {", ".join(f"{k} {v:.4g}" for k, v in shown.items()) or "none"}
{curve}
## Use

```python
from {package} import {opener}
from transformers import AutoTokenizer

model = {opener}.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello!"}}],
    add_generation_prompt=True, return_dict=True, return_tensors="pt",
{more})
reply = model.generate(**prompt, max_new_tokens=256, eos_token_id={stop_ids})
print(tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

The prompt format is the tokenizer's chat template. `run.json` holds every setting.
"""
    write_text(directory / "README.md", text)
