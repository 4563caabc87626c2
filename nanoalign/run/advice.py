"""Advice at the start of a run: a line for each setting that will hardly work.

The bounds for KTO come from its authors (arXiv 2402.01306, and the guide to their code).
"""

import math
from collections.abc import Iterator

from transformers import AutoConfig

from nanoalign import InputError
from nanoalign.data import Examples
from nanoalign.formats.files import from_pretrained
from nanoalign.losses import compares
from nanoalign.run.flags import Config, KTOConfig, ReferenceConfig

ONE_LABEL = "one label only; KTO weighs thumbs up against thumbs down"


def advice(cfg: Config, examples: Examples, cut: int = 0, full: int = 0) -> Iterator[str]:
    """Lines about a run's flags and examples. `cut`: how many completions were cut short; `full`:
    how many rows of the data were skipped because the prompt fills max_length."""
    rate = f"--learning_rate {cfg.learning_rate:g}"
    yield from advice_on_prompts(full, cfg.max_length)
    if cut > 0.2 * len(examples):
        yield f"--max_length {cfg.max_length} cuts {cut} completions short; a higher one fits them"
    if not cfg.use_peft and cfg.learning_rate > 1e-4:
        yield f"{rate} is high for training all weights; try 1e-5"
    attention = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"}
    if cfg.use_peft and attention.issuperset(cfg.lora_target_modules):
        targets = " ".join(cfg.lora_target_modules)
        yield f"--lora_target_modules {targets}: most weights are in the MLPs: try all-linear"
    compared = isinstance(cfg, ReferenceConfig) and compares(cfg.loss)
    if compared and not 0.01 <= cfg.beta <= 1:
        why = (
            "the policy can hardly move"
            if cfg.beta > 1
            else "little holds the policy to the reference"
        )
        yield f"--beta {cfg.beta:g}: {why}; 0.1 is usual, 0.01 to 0.5 common"
    if not isinstance(cfg, KTOConfig):
        return
    step = cfg.per_step
    if step < 4:
        yield f"a step of {step} examples is too small to estimate KTO's z0; take 4 at least"
    elif not 16 <= step <= 128:
        yield f"a step of {step} examples: KTO works best with 16 to 128"
    if not cfg.use_peft and not 5e-7 <= cfg.learning_rate <= 5e-6:
        yield f"{rate}: KTO of all weights wants 5e-7 to 5e-6"
    up, flags = sum(e.label for e in examples), (cfg.desirable_weight, cfg.undesirable_weight)
    if line := suggested_weights(up, len(examples) - up, *flags):
        yield line


def advice_on_prompts(full: int, max_length: int) -> Iterator[str]:
    """A line about `full` rows of the data whose prompt leaves no room for a completion."""
    if full:
        fits = "a higher one fits them, or --max_prompt_length cuts them"
        yield f"prompts fill --max_length {max_length} in {full} rows, which are skipped; {fits}"


def length_advice(cfg: Config, name: str) -> Iterator[str]:
    """A line if --max_length is more than the model `name` was made for. InputError if its
    positions can't go that far."""
    config = from_pretrained(AutoConfig, name, trust_remote_code=cfg.trust_remote_code)
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    asked = f"--max_length {cfg.max_length}: {name}"
    for part in (rope, *rope.values()):  # one for all layers, or one for each kind of layer
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if kind not in ("longrope", "dynamic"):
            continue
        short = part.get("original_max_position_embeddings") or limit
        if cfg.max_length > short:  # a longer example would change the log-probs of its whole row
            fault = f"has {kind} positions, which change beyond {short} tokens"
            raise InputError(f"{asked} {fault}; give at most {short}")
    if cfg.max_length > limit and not rope:
        raise InputError(f"{asked} has {limit} learned positions; give as many at most")
    if cfg.max_length > limit:
        yield f"{asked} was made for {limit} positions; longer examples may not work well"


def suggested_weights(up: int, down: int, w_up: float = 1.0, w_down: float = 1.0) -> str | None:
    """A line that suggests a weight for KTO, or None if the weights are right.

    up, down: how many thumbs; w_up, w_down: their weights. The ratio (w_up * up) : (w_down * down)
    should be 1:1 to 4:3 by the first version of KTO's paper, 1:1 to 3:2 by the fourth (eq. 9). The
    weights are right if one version says so; the suggestion fits both.
    """
    if not up or not down:  # train_kto.py says ONE_LABEL
        return None
    if w_down * down <= w_up * up <= 3 / 2 * w_down * down:
        return None
    # Change the weight of the rarer label. But if one is 0, change that one.
    if w_up == 0 or (up < down and w_down > 0):
        name, low = "desirable_weight", w_down * down / up
    else:
        name, low = "undesirable_weight", w_up * up / down * 3 / 4
    return (
        f"thumbs up and down weigh {w_up * up:g} : {w_down * down:g}; --{name} {low:.2f} to "
        f"{low * 4 / 3:.2f} brings them to between 1:1 and 4:3 (KTO's paper, v1; v4: and 3:2)"
    )
