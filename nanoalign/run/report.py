"""The report of a finished run: its curves, a model card, and some closing lines.

curves.png shows the metrics of metrics.jsonl: the loss and, for DPO and KTO, the rewards, their
margin, their accuracy and the KL estimate. It needs matplotlib (pip install 'nanoalign[plot]'). The
model card is README.md, in the form that the hub reads.
"""

import json
from contextlib import suppress
from pathlib import Path

import nanoalign
from nanoalign import InputError, world
from nanoalign.formats.rows import storage
from nanoalign.formats.templates import KWARGS
from nanoalign.model import Policy
from nanoalign.run import ranks
from nanoalign.run.files import write_file, write_text
from nanoalign.run.flags import Config
from nanoalign.run.log import best_of
from nanoalign.run.session import Run

PANELS = {  # title -> the metrics in it
    "loss": ["loss"],
    "rewards": ["rewards/chosen", "rewards/rejected"],
    "reward margin": ["rewards/margins"],
    "reward accuracy": ["rewards/accuracies"],
    "kl": ["kl"],
    "gradient norm": ["grad_norm"],
}


def finish(cfg: Config, run: Run) -> Run:
    """Write curves and a model card into the run's directory, and print the closing lines."""
    if ranks.RANK:
        return run
    directory = Path(cfg.output_dir)
    lines = read_run(directory)
    try:
        draw({directory.name: lines}, directory / "curves.png")
    except ImportError:
        print("no curves.png: pip install 'nanoalign[plot]' for that")
    if lines:
        last = (cfg.load_best_model_at_end and best_of(cfg, lines)[0]) or lines[-1]
        write_card(cfg, run.policy, directory, len(run.examples), last)
    if line := afterthought(lines):
        print(line)
    if run.before:
        print(world.report(run.before, world.measure(run.policy)))
    print(f"saved in {cfg.output_dir}")
    return run


def read_run(directory: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. InputError if it can't be read."""
    path = Path(directory) / "metrics.jsonl"
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a directory of a run") from None
    except ValueError as error:
        raise InputError(f"{path}: not a run's metrics: {error}") from None
    return [read_line(text, f"{path}, line {number}") for number, text in enumerate(texts, 1)]


def read_line(text: str, where: str) -> dict[str, float]:
    """Parse a line of metrics.jsonl: numbers by name, with a step. `where` is for the error."""
    line = None
    with suppress(ValueError, RecursionError):
        line = json.loads(text)
    if isinstance(line, dict) and "step" in line:
        if all(type(value) in (int, float) for value in line.values()):
            return line
    raise InputError(f"{where}: not a run's metrics; expected numbers by name, a step among them")


def points(lines: list[dict], name: str) -> tuple[list, list]:
    """A metric's curve: the steps where it was measured, and its values."""
    measured = [line for line in lines if name in line]
    return [line["step"] for line in measured], [line[name] for line in measured]


def draw(runs: dict[str, list[dict]], out: Path) -> bool:
    """Draw the curves of some runs into one file, a panel for each group of PANELS. Evaluations are
    dots. -> False if there is nothing to draw."""
    from matplotlib.figure import Figure  # pyplot would change the figures of a notebook

    seen = {n.removeprefix("eval_") for lines in runs.values() for line in lines for n in line}
    panels = {title: names for title, names in PANELS.items() if seen.intersection(names)}
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    for number, (title, names) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, columns, number)
        for run, lines in runs.items():
            for name in names:
                label = [run] * (len(runs) > 1) + [name.rpartition("/")[2]] * (len(names) > 1)
                (drawn,) = axis.plot(*points(lines, name), label=" ".join(label))
                dots = points(lines, f"eval_{name}")
                axis.plot(*dots, "o", color=drawn.get_color(), markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(runs) * len(names) > 1:
            axis.legend(fontsize=8, frameon=False)
    write_file(out, lambda tmp: figure.savefig(tmp, dpi=120, format=out.suffix[1:]))
    return True


def write_card(cfg: Config, policy: Policy, directory: Path, examples: int, last: dict) -> None:
    """Write the model card of a policy that was trained on so many examples. `last` is the line of
    metrics that it shows. An adapter's base does not know where a reply ends, so the card's code
    says it."""
    lora, stop_ids = policy.lora, policy.template.stop_ids
    template_kwargs = policy.tokenizer.init_kwargs.get(KWARGS) or {}
    package, opener = "transformers", "AutoModelForCausalLM"
    base, tag, trained = cfg.model_name_or_path, "", "all weights"
    if lora:
        package, opener = "peft", "AutoPeftModelForCausalLM"
        base, tag = lora.base_model_name_or_path or base, "\n- lora"
        trained = f"LoRA, r={lora.r}, alpha={lora.lora_alpha:g}"
    method = "supervised fine-tuning" if cfg.method == "sft" else cfg.method.upper()
    base_model, shown_base = f"base_model: {base}\n", base
    if storage(base) != "hub":  # a path on this machine means nothing there
        base_model, shown_base = "", Path(base).name
    named = [f"\n- {name}" for name in cfg.dataset_name if storage(name) == "hub"]
    datasets = "".join(["datasets:", *named, "\n"]) if named else ""
    curve = "\n![curves](curves.png)\n" if (directory / "curves.png").exists() else ""
    more = "".join(f"    {name}={value!r},\n" for name, value in template_kwargs.items())
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


def afterthought(lines: list[dict]) -> str | None:
    """A line that explains the metrics, if a reader may take them for a fault."""
    rewards = [line for line in lines if "rewards/margins" in line]
    if not rewards:
        return None
    first, last = rewards[0], rewards[-1]
    fell = last["rewards/chosen"] < min(0, first["rewards/chosen"])
    if not fell or last["rewards/margins"] <= first["rewards/margins"]:
        return None
    return (
        "both rewards fell while the margin rose: that is normal, the loss sees their difference; "
        "a higher --beta, a lower --learning_rate or DPO's --rpo_alpha holds the chosen reply up"
    )
