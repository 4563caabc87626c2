"""The flags: one dataclass a script, one line a flag.

Names and defaults are those that users of TRL type from habit. All that is known of a flag stands
in its line: type, default, help, bounds, and when it has nothing to do. `parse` reads the command
line: an unknown or abbreviated flag, an impossible value and two flags that contradict each other
raise InputError; a flag that has nothing to do in this run is one printed line.
"""

import math
import sys
from argparse import ArgumentParser
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin

from transformers import HfArgumentParser

from nanoalign import InputError
from nanoalign.formats.templates import TEMPLATES
from nanoalign.formats.weights import FORMATS
from nanoalign.losses import DPO_LOSSES, KTO_LOSSES, compares, needs


def flag(default, help: str, **more):
    """A dataclass field with its line of --help.

    Its bounds: more than `above`, or at least `least` and `below` this, or at `most` that. `idle`
    is a function of the config that tells whether the flag has nothing to do in its run. Whatever
    else is given goes to argparse.
    """
    meta = {"help": help, **more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


def goes_on(cfg) -> bool:
    """The adapter brings its own r, alpha, targets ..."""
    return cfg.adapter_name_or_path is not None


def no_evaluation(cfg) -> bool:
    return not (cfg.eval_dataset or cfg.eval_fraction)


def no_lora_dropout(cfg) -> bool:
    return goes_on(cfg) or (cfg.disable_dropout and cfg.lora_dropout > 0)


def no_splits(sources: list[str]) -> bool:
    """A data set of the hub has them, a file has not."""
    return all(source.lower().endswith((".json", ".jsonl", ".csv")) for source in sources)


def dense(cfg) -> bool:
    return not cfg.load_in_4bit


def no_reference(cfg) -> bool:
    return not compares(cfg.loss)


# fmt: off
@dataclass
class Config:
    """What the three scripts share."""

    # model
    model_name_or_path: str | None = flag(
        None, "directory, hub id or .gguf file; none: the built-in model")
    adapter_name_or_path: str | None = flag(
        None, "adapter to go on from; the reference is that adapter")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "of the frozen weights and of computing; auto: the checkpoint's")
    bf16: bool = flag(False, "the same as --dtype bfloat16")
    fp16: bool = flag(False, "float16 with dynamic loss scaling, for GPUs without bfloat16")
    device: str = flag("auto", "cpu, cuda, mps; auto: the best there is")
    chat_template: str = flag("chatml", "native: the tokenizer's own template", choices=TEMPLATES)
    trust_remote_code: bool = flag(False, "run code that comes with the model")
    # QLoRA
    load_in_4bit: bool = flag(False, "hold the frozen linear layers in 4 bits (nf4.py)")
    use_bnb_nested_quant: bool = flag(
        False, "quantize their scales too: 4.13 bits, not 4.50", idle=dense)
    bnb_4bit_quant_type: str = flag("nf4", "the frozen format", choices=FORMATS, idle=dense)
    # LoRA
    use_peft: bool = flag(True, "LoRA; false trains all weights")
    lora_r: int = flag(16, "rank of the change", above=0, idle=goes_on)
    lora_alpha: float = flag(16, "its scale: alpha / r", above=0, idle=goes_on)
    lora_dropout: float = flag(0.05, "dropout before A", least=0, below=1.0, idle=no_lora_dropout)
    lora_target_modules: list[str] = flag(
        ["all-linear"], "names, a regex, or all-linear", idle=goes_on)
    lora_modules_to_save: list[str] = flag([], "modules that train whole (lm_head)", idle=goes_on)
    lora_bias: Literal["none", "lora_only", "all"] = flag("none", "biases that train", idle=goes_on)
    use_rslora: bool = flag(False, "scale by alpha / sqrt(r)", idle=goes_on)
    # data
    dataset_name: list[str] = flag([], "JSON, JSONL or CSV files, or a data set of the hub")
    dataset_train_split: str = flag("train", "split of a hub data set to train on",
                                    idle=lambda c: no_splits(c.dataset_name))
    dataset_test_split: str = flag("test", "split of a hub data set to evaluate on",
                                   idle=lambda c: no_splits(c.eval_dataset))
    eval_dataset: list[str] = flag([], "files to evaluate on")
    eval_fraction: float = flag(
        0.0, "share of the training rows to hold out for evaluation", least=0, below=1.0)
    shuffle_dataset: bool = flag(True, "a new order in each epoch")
    input_as_system: bool = flag(False, "the column `input` holds the system turn")
    max_length: int = flag(
        1024, "tokens of prompt and completion; completions are cut from the right", above=0)
    max_prompt_length: int | None = flag(None, "tokens of the prompt", above=0)
    truncation_mode: Literal["keep_end", "keep_start"] = flag(
        "keep_end", "what stays of a longer prompt", idle=lambda c: c.max_prompt_length is None)
    # training
    output_dir: str | None = flag(None, "where everything goes")
    resume_from_checkpoint: str | None = flag(
        None, "go on from the newest checkpoint of output_dir, or from this one",
        nargs="?", const="last")
    overwrite_output_dir: bool = flag(
        False, "use an output_dir that is not empty", idle=lambda c: c.resume_from_checkpoint)
    per_device_train_batch_size: int = flag(8, "examples a micro-batch", above=0)
    per_device_eval_batch_size: int = flag(
        8, "examples an evaluation batch", above=0, idle=no_evaluation)
    gradient_accumulation_steps: int = flag(1, "micro-batches an optimizer step", above=0)
    max_row_tokens: int | None = flag(
        None, "cut a longer micro-batch in rows of this many: less memory; none: by device",
        above=0)
    num_train_epochs: float = flag(
        3.0, "passes over the data", above=0, idle=lambda c: c.max_steps > 0)
    max_steps: int = flag(-1, "optimizer steps; overrides num_train_epochs")
    learning_rate: float = flag(1e-6, "the highest learning rate", least=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = flag("linear", "after the warm-up")
    warmup_ratio: float = flag(
        0.0, "share of the steps in which the learning rate rises from 0", least=0, most=1)
    warmup_steps: int = flag(0, "the same as a number of steps", least=0)
    optim: Literal["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"] = flag(
        "adamw_torch", "AdamW")
    weight_decay: float = flag(0.0, "AdamW's, on matrices and vectors alike", least=0)
    adam_beta1: float = flag(0.9, "AdamW's", least=0, below=1.0)
    adam_beta2: float = flag(0.999, "AdamW's", least=0, below=1.0)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm to this; 0: don't", least=0)
    gradient_checkpointing: bool = flag(
        False, "recompute activations in backward: less memory, slower")
    torch_compile: bool = flag(False, "compile the layers: a slow first step, then faster ones")
    disable_dropout: bool = flag(True, "no dropout anywhere")
    seed: int = flag(42, "of weights, order and dropout", least=0)
    # watching
    logging_steps: int = flag(10, "steps between two lines of metrics", above=0)
    logging_first_step: bool = flag(
        False, "a line for step 1 too", idle=lambda c: c.logging_steps == 1)
    eval_steps: int | None = flag(
        None, "steps between two evaluations; none: at the end", above=0, idle=no_evaluation)
    generate_during_eval: bool = flag(
        False, "show replies to held-out prompts at evaluation", idle=no_evaluation)
    save_steps: int | None = flag(500, "steps between two checkpoints", above=0)
    save_total_limit: int | None = flag(None, "keep only the newest checkpoints", above=0)
    skip_nonfinite: int = flag(
        0, "pass over this many steps whose loss or gradient is not finite", least=0)
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", "metrics go there as well")

    @property
    def method(self) -> str:
        """The method's short name, in run.json and the model card's tags: "dpo" of DPOConfig."""
        return type(self).__name__.removesuffix("Config").lower()

    @property
    def method_name(self) -> str:
        """The method in words, for the model card."""
        return self.method.upper()


@dataclass
class SFTConfig(Config):
    method_name = "supervised fine-tuning"
    learning_rate: float = flag(2e-5, "the highest learning rate", least=0)
    disable_dropout: bool = flag(False, "no dropout anywhere")
    neftune_noise_alpha: float = flag(
        0.0, "noise on the embeddings, 5 say (arXiv 2310.05914)", least=0)


@dataclass
class ReferenceConfig(Config):
    """What DPO and KTO share. A number that only some losses take is a flag of the same name."""

    beta: float = flag(0.1, "price of moving away from the reference", above=0)
    ref_model_name_or_path: str | None = flag(
        None, "another model as the reference", idle=no_reference)
    precompute_ref_log_probs: bool = flag(
        False, "reference log-probs of all data before step 1",
        idle=lambda c: no_reference(c) or not c.use_peft and not c.ref_model_name_or_path)

    @property
    def loss(self):
        return self.losses[self.loss_type]


@dataclass
class DPOConfig(ReferenceConfig):
    losses = DPO_LOSSES
    loss_type: str = flag("sigmoid", "see losses.py", choices=DPO_LOSSES)
    label_smoothing: float = flag(
        0.0, "probability that a pair is the wrong way round", least=0, below=0.5)
    rpo_alpha: float = flag(0.0, "weight of the chosen reply's own SFT loss", least=0)


@dataclass
class KTOConfig(ReferenceConfig):
    losses = KTO_LOSSES
    loss_type: str = flag("kto", "see losses.py", choices=KTO_LOSSES)
    desirable_weight: float = flag(1.0, "of thumbs up", least=0)
    undesirable_weight: float = flag(1.0, "of thumbs down", least=0)
# fmt: on


class Parser(HfArgumentParser):
    def add_argument(self, *names, above=None, least=None, below=None, most=None, idle=None, **how):
        """argparse gets what it knows of a flag; bounds and idleness are for `check`."""
        return super().add_argument(*names, **how)

    def error(self, message):  # argparse prints forty lines of usage before it
        raise InputError(f"{message} (--help lists the flags)")


def add_flags(parser: ArgumentParser, *names: str) -> None:
    """Give a tool's parser these flags of Config: their types, defaults, choices and help."""
    for f in fields(Config):
        if f.name in names:
            kinds = get_args(f.type) or (f.type,)  # the words of a Literal; int of int | None
            words = kinds if get_origin(f.type) is Literal else f.metadata.get("choices")
            how = {"choices": words} if words else {"type": kinds[0]}
            if f.type is bool:  # the scripts take a value after it; here that may be a directory
                how = {"action": "store_true"}
            parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **how)


def parse(kind: type[Config], argv: list[str], built_in: dict) -> Config:
    """argv -> a checked config.

    `built_in` holds a script's own settings: they are the defaults where no model is given.
    """
    parser = Parser(kind, allow_abbrev=False, description=sys.modules["__main__"].__doc__)
    cfg = kind(**vars(parser.parse_args(argv)))
    names = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    counts = Counter(name.removeprefix("no_") for name in names)  # --learning-rate is a flag too
    for name, times in counts.items():
        if times > 1:  # argparse would take the last one
            raise InputError(f"--{name} is given {times} times; expected once")
    given = set(counts)
    if cfg.model_name_or_path is None and cfg.adapter_name_or_path is None:
        for name, value in built_in.items():
            if name not in given:
                setattr(cfg, name, value)
    check(cfg, given)
    return cfg


def check(cfg: Config, given: set[str]) -> None:
    """Impossible values and contradictions raise InputError; idle flags are one printed line."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if wrong := out_of_bounds(value, **f.metadata):
            raise InputError(f"--{f.name} {value}: must {wrong}")
    if cfg.max_steps < 1 and cfg.max_steps != -1:
        raise InputError(f"--max_steps {cfg.max_steps}: must be more than 0, or -1 for epochs")
    if cfg.seed >= 2**63:
        raise InputError(f"--seed {cfg.seed}: must be less than 2**63")

    def contradiction(first: str, second: str):
        raise InputError(f"--{first} and --{second} contradict each other; give one of them")

    pairs = ("bf16", "fp16"), ("warmup_ratio", "warmup_steps"), ("eval_dataset", "eval_fraction")
    for first, second in pairs:
        if getattr(cfg, first) and getattr(cfg, second):
            contradiction(first, second)
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(cfg, name):
            if cfg.dtype not in ("auto", dtype):
                contradiction(name, f"dtype {cfg.dtype}")
            cfg.dtype = dtype
    if not cfg.use_peft:
        for name in sorted(given):
            if name.startswith("lora_") or name in ("use_rslora", "adapter_name_or_path"):
                contradiction("use_peft false", name)
        if cfg.load_in_4bit:  # 4-bit weights can't train
            contradiction("use_peft false", "load_in_4bit")
    if not cfg.model_name_or_path and not cfg.adapter_name_or_path:
        raise InputError("--model_name_or_path: give the model to train")
    if not cfg.dataset_name:
        raise InputError("--dataset_name: give the data to train on")
    idle = {f.name for f in fields(cfg) if "idle" in f.metadata and f.metadata["idle"](cfg)}
    if isinstance(cfg, ReferenceConfig):  # the numbers of losses that were not chosen
        idle |= set().union(*map(needs, cfg.losses.values())) - needs(cfg.loss)
    for name in sorted(given & idle):
        print(f"--{name} has nothing to do in this run")
    if cfg.optim == "paged_adamw_32bit":
        print("--optim paged_adamw_32bit: plain AdamW is used until paging exists here")


def out_of_bounds(
    value, above=-math.inf, least=-math.inf, below=math.inf, most=math.inf, **others
) -> str | None:
    """What a flag's value must be, where it is not; NaN and infinity lie within no bounds."""
    if not isinstance(value, int | float) or (above < value < below and least <= value <= most):
        return None
    if not abs(value) < math.inf:
        return "be a finite number"
    if above > -math.inf:
        return f"be more than {above}"
    if below < math.inf:
        return f"be at least {least} and below {below}"
    return f"be at least {least} and at most {most}" if most < math.inf else "not be negative"
