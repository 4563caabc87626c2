"""Advice, once, at the start: settings that can't do what they are meant for, one line each.

The bounds for KTO are its authors' (arXiv 2402.01306, and the guide to their code).
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
    """What somebody who has done this before would say of a run. `cut`: completions cut short;
    `full`: rows whose prompt leaves no room for one."""
    rate = f"--learning_rate {cfg.learning_rate:g}"
    yield from advice_on_prompts(full, cfg.max_length)
    if cut > 0.2 * len(examples):
        yield f"--max_length {cfg.max_length} cuts {cut} completions short; a longer one fits them"
    if not cfg.use_peft and cfg.learning_rate > 1e-4:
        yield f"{rate} is high for training all weights; try 1e-5"
    attention = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"}
    if cfg.use_peft and attention.issuperset(cfg.lora_target_modules):
        targets = " ".join(cfg.lora_target_modules)
        yield f"--lora_target_modules {targets}: most weights are in the MLPs: try all-linear"
    compared = isinstance(cfg, ReferenceConfig) and compares(cfg.loss)
    if compared and not 0.01 <= cfg.beta <= 1:
        why = "it can hardly move" if cfg.beta > 1 else "little holds the policy to the reference"
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
    up = sum(e.label for e in examples)
    given = cfg.desirable_weight, cfg.undesirable_weight
    if weights := suggested_weights(up, len(examples) - up, *given):
        yield weights


def advice_on_prompts(full: int, max_length: int) -> Iterator[str]:
    """What to do about rows whose prompt leaves no room for a completion."""
    if full:
        fits = "a longer one fits them, or --max_prompt_length cuts them"
        yield f"prompts fill --max_length {max_length} in {full} rows, which are skipped; {fits}"


def length_advice(cfg: Config, name: str) -> Iterator[str]:
    """What the positions of the model `name` say of --max_length; InputError where they can't
    serve it."""
    config = from_pretrained(AutoConfig, name, trust_remote_code=cfg.trust_remote_code)
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    asked = f"--max_length {cfg.max_length}: {name}"
    for part in (rope, *rope.values()):  # one for all layers, or one for each kind of layer
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if kind not in ("longrope", "dynamic"):
            continue
        short = part.get("original_max_position_embeddings") or limit
        if cfg.max_length > short:  # one longer example changes the log-probs of its whole row
            fault = f"has {kind} positions, which change beyond {short} tokens"
            raise InputError(f"{asked} {fault}; give at most {short}")
    if cfg.max_length > limit and not rope:
        raise InputError(f"{asked} has {limit} learned positions; give as many at most")
    if cfg.max_length > limit:
        yield f"{asked} was made for {limit} positions; longer examples may do it harm"


def suggested_weights(up: int, down: int, w_up: float = 1.0, w_down: float = 1.0) -> str | None:
    """The weights that bring (w_up * up) : (w_down * down) into 1:1 to 4:3, where it is not within
    1:1 to 3:2.

    KTO's paper asks for the former in its first version, and for the latter in the fourth (eq. 9).
    So nothing is said of what either would have, and what is advised is right by both.
    """
    if not up or not down:  # said elsewhere: KTO learns from the contrast of both
        return None
    if w_down * down <= w_up * up <= 3 / 2 * w_down * down:
        return None
    # The rarer label's weight is the one to change; but no other can make up for a weight of 0.
    if w_up == 0 or (up < down and w_down > 0):
        name, low = "desirable_weight", w_down * down / up
    else:
        name, low = "undesirable_weight", w_up * up / down * 3 / 4
    return (
        f"thumbs up and down weigh {w_up * up:g} : {w_down * down:g}; --{name} {low:.2f} to "
        f"{low * 4 / 3:.2f} brings them to between 1:1 and 4:3 (KTO's paper, v1; v4: and 3:2)"
    )
