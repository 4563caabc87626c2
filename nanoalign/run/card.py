"""The model card: README.md of an output directory, in the convention of the hub."""

from pathlib import Path

import nanoalign
from nanoalign.formats.peft import LoRAConfig
from nanoalign.formats.rows import on_hub
from nanoalign.run.flags import Config

CARD = """\
---
base_model: {base}
library_name: {package}
pipeline_tag: text-generation
tags:
- {cfg.method}
- nanoalign{lora_tag}
{datasets}---

# {title}

{base}, trained with {method} by nanoalign {version}.

| | |
|---|---|
| data | {data}: {examples} examples |
| trained | {trained} |
| steps | {steps}, learning rate {cfg.learning_rate:g}, seed {cfg.seed} |

Last metrics: {metrics}
{curve}
## Use

```python
from {package} import {opener}
from transformers import AutoTokenizer

model = {opener}.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```

The prompt format is the tokenizer's chat template. `run.json` holds every setting.
"""


def write_card(
    cfg: Config, lora: LoRAConfig | None, directory: Path, examples: int, last: dict
) -> None:
    """`lora` is None when all weights trained; `last` is the last line of metrics.jsonl."""
    shown = {k: v for k, v in last.items() if k not in ("step", "time", "tokens_per_second")}
    named = [f"- {name}\n" for name in cfg.dataset_name if on_hub(name)]
    text = CARD.format(
        cfg=cfg,
        base=lora.base_model_name_or_path if lora else cfg.model_name_or_path,
        method="supervised fine-tuning" if cfg.method == "sft" else cfg.method.upper(),
        version=nanoalign.__version__,
        title=directory.resolve().name,
        datasets="".join(["datasets:\n", *named]) if named else "",
        data=", ".join(Path(name).name for name in cfg.dataset_name),
        examples=examples,
        steps=last.get("step", 0),
        metrics=", ".join(f"{k} {v:.4g}" for k, v in shown.items()) or "none",
        curve="\n![curves](curves.png)\n" if (directory / "curves.png").exists() else "",
        lora_tag="\n- lora" if lora else "",
        trained=f"LoRA, r={lora.r}, alpha={lora.lora_alpha:g}" if lora else "all weights",
        package="peft" if lora else "transformers",
        opener="AutoPeftModelForCausalLM" if lora else "AutoModelForCausalLM",
    )
    (directory / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
