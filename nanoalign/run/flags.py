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
from nanoalign.formats.rows import on_hub
from nanoalign.formats.templates import TEMPLATES
from nanoalign.formats.weights import FORMATS
from nanoalign.losses import DPO_LOSSES, INPUTS, KTO_LOSSES, compares, needs
from nanoalign.run import ranks

# What a flag's number must do, as the error says it, and whether a number does.
POSITIVE = "be more than 0", lambda x: x > 0
NOT_NEGATIVE = "not be negative", lambda x: x >= 0
SHARE = "be at least 0 and below 1", lambda x: 0 <= x < 1


def flag(default, help: str, must=None, **more):
    """A dataclass field with its line of --help.

    Its number `must` be POSITIVE, say. `idle` is a function of the config that tells whether the
    flag has nothing to do in its run. A `free` flag changes nothing that is computed but its
    rounding, so it may change when a run is resumed. Whatever else is given goes to argparse.
    """
    meta = {"help": help, "must": must, **more}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=meta)
    return field(default=default, metadata=meta)


def goes_on(cfg) -> bool:
    """The adapter brings its own r, alpha, targets ..."""
    return cfg.adapter_name_or_path is not None


def no_evaluation(cfg) -> bool:
    return not (cfg.eval_dataset or cfg.eval_fraction)


# fmt: off
@dataclass
class Config:
    """What the three scripts share."""

    # model
    model_name_or_path: str | None = flag(None, "directory, hub id or .gguf; none: built-in")
    adapter_name_or_path: str | None = flag(None, "adapter to go on from; also the reference")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "of the frozen weights and of computing; auto: the checkpoint's")
    bf16: bool = flag(False, "the same as --dtype bfloat16")
    fp16: bool = flag(False, "the same as --dtype float16: for GPUs without bfloat16")
    device: str = flag("auto", "cpu, cuda, mps; auto: the best there is")
    tf32: bool = flag(
        True, "on CUDA, float32 products keep 10 bits of a factor: much faster",
        idle=lambda c: c.device in ("cpu", "mps"), free=True)
    threads: int | None = flag(
        None, "of a CPU; none: as OMP_NUM_THREADS has it, else one a core", POSITIVE, free=True)
    chat_template: str | None = flag(
        None, "native: the tokenizer's own template; none: what it was trained with, else chatml",
        choices=TEMPLATES)
    trust_remote_code: bool = flag(False, "run code that comes with the model")
    # QLoRA
    load_in_4bit: bool = flag(False, "hold the frozen linear layers in 4 bits (nf4.py)")
    use_bnb_nested_quant: bool = flag(
        False, "quantize their scales too: 4.13 bits, not 4.50", idle=lambda c: not c.load_in_4bit)
    bnb_4bit_quant_type: str = flag(
        "nf4", "the frozen format", choices=FORMATS, idle=lambda c: not c.load_in_4bit)
    # LoRA
    use_peft: bool = flag(True, "LoRA; false trains all weights")
    lora_r: int = flag(16, "rank of the change", POSITIVE, idle=goes_on)
    lora_alpha: float = flag(16, "its scale: alpha / r", POSITIVE, idle=goes_on)
    lora_dropout: float = flag(
        0.05, "dropout before A", SHARE,
        idle=lambda c: goes_on(c) or (c.disable_dropout and c.lora_dropout > 0))
    lora_target_modules: list[str] = flag(["all-linear"], "names or a regex", idle=goes_on)
    lora_modules_to_save: list[str] = flag([], "modules that train whole (lm_head)", idle=goes_on)
    lora_bias: Literal["none", "lora_only", "all"] = flag("none", "biases that train", idle=goes_on)
    use_rslora: bool = flag(False, "scale by alpha / sqrt(r)", idle=goes_on)
    # data
    dataset_name: list[str] = flag([], "JSON, JSONL or CSV files, or a data set of the hub")
    dataset_train_split: str = flag(
        "train", "split of a hub data set", idle=lambda c: not any(map(on_hub, c.dataset_name)))
    dataset_test_split: str = flag(
        "test", "its split to evaluate on", idle=lambda c: not any(map(on_hub, c.eval_dataset)))
    eval_dataset: list[str] = flag([], "files to evaluate on")
    eval_fraction: float = flag(0.0, "share of the rows held out for evaluation", SHARE)
    shuffle_dataset: bool = flag(True, "a new order in each epoch")
    input_as_system: bool = flag(False, "the column `input` holds the system turn")
    max_length: int = flag(1024, "tokens of prompt and completion, whose end is cut", POSITIVE)
    max_prompt_length: int | None = flag(None, "tokens of the prompt", POSITIVE)
    truncation_mode: Literal["keep_end", "keep_start"] = flag(
        "keep_end", "what stays of a longer prompt", idle=lambda c: c.max_prompt_length is None)
    # training
    output_dir: str | None = flag(None, "where everything goes", free=True)
    resume_from_checkpoint: str | None = flag(
        None, "go on from the newest checkpoint of output_dir, or from this one",
        nargs="?", const="last", free=True)
    overwrite_output_dir: bool = flag(
        False, "use one that is not empty, and what an earlier run left there goes", free=True)
    per_device_train_batch_size: int = flag(
        8, "examples a micro-batch, on each device", POSITIVE, free=True)
    per_device_eval_batch_size: int = flag(
        8, "examples an evaluation batch", POSITIVE, idle=no_evaluation, free=True)
    gradient_accumulation_steps: int = flag(
        1, "micro-batches an optimizer step, on each device", POSITIVE, free=True)
    max_row_tokens: int | None = flag(
        None, "cut longer micro-batches in rows of so many; none: by a GPU's free memory", POSITIVE,
        free=True)
    num_train_epochs: float = flag(
        3.0, "passes over the data", POSITIVE, idle=lambda c: c.max_steps > 0)
    max_steps: int = flag(
        -1, "optimizer steps; overrides num_train_epochs",
        ("be more than 0, or -1 for epochs", lambda n: n > 0 or n == -1))
    learning_rate: float = flag(1e-6, "the highest learning rate", NOT_NEGATIVE)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = flag("linear", "after the warm-up")
    warmup_ratio: float = flag(
        0.0, "share of the steps in which the learning rate rises from 0",
        ("be at least 0 and at most 1", lambda x: 0 <= x <= 1))
    warmup_steps: int = flag(0, "the same as a number of steps", NOT_NEGATIVE)
    optim: Literal["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"] = flag(
        "adamw_torch", "AdamW; paged: its states in the CPU's memory, for training all weights",
        idle=lambda c: c.optim == "paged_adamw_32bit" and c.device == "cpu", free=True)
    weight_decay: float = flag(0.0, "AdamW's, on matrices and vectors alike", NOT_NEGATIVE)
    adam_beta1: float = flag(0.9, "AdamW's", SHARE)
    adam_beta2: float = flag(0.999, "AdamW's", SHARE)
    router_aux_loss_coef: float | None = flag(
        None, "weight of a mixture's load-balancing loss; none: the model's own; 0: without it",
        NOT_NEGATIVE)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm to this; 0: don't", NOT_NEGATIVE)
    gradient_checkpointing: bool | None = flag(
        None, "less memory, slower: activations are recomputed; none: by a GPU's free memory",
        nargs="?", const=True, free=True)
    fsdp: bool = flag(
        False, "cut the model between torchrun's processes, layer by layer",
        idle=lambda c: not ranks.LAUNCHED, free=True)
    torch_compile: bool | None = flag(
        None, "compile the layers: slow first steps, then faster ones; none: on a GPU that can",
        nargs="?", const=True, free=True)
    disable_dropout: bool = flag(True, "no dropout anywhere")
    seed: int = flag(42, "of weights, order and dropout", NOT_NEGATIVE)
    # watching
    logging_steps: int = flag(10, "steps between two lines of metrics", POSITIVE, free=True)
    logging_first_step: bool = flag(
        False, "a line for step 1 too", idle=lambda c: c.logging_steps == 1, free=True)
    eval_steps: int | None = flag(
        None, "steps between evals; none: at the end", POSITIVE, idle=no_evaluation, free=True)
    generate_during_eval: bool = flag(
        False, "show replies to held-out prompts at evaluation", idle=no_evaluation, free=True)
    save_steps: int = flag(
        500, "steps between two checkpoints; 0: none, unless the run is stopped", NOT_NEGATIVE,
        free=True)
    save_total_limit: int | None = flag(None, "newest checkpoints to keep", POSITIVE, free=True)
    skip_nonfinite: int = flag(
        0, "pass over this many steps whose loss or gradient is not finite", NOT_NEGATIVE,
        free=True)
    report_to: Literal["none", "tensorboard", "wandb"] = flag(
        "none", "metrics go there as well", free=True)

    @property
    def method(self) -> str:
        """The method's short name, in run.json and the model card: "dpo" of DPOConfig."""
        return type(self).__name__.removesuffix("Config").lower()

    @property
    def per_step(self) -> int:
        """Examples an optimizer step, on all devices."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * ranks.WORLD


@dataclass
class SFTConfig(Config):
    learning_rate: float = flag(2e-5, "the highest learning rate", NOT_NEGATIVE)
    disable_dropout: bool = flag(False, "no dropout anywhere")
    neftune_noise_alpha: float = flag(
        0.0, "noise on the embeddings, 5 say (arXiv 2310.05914)", NOT_NEGATIVE)


@dataclass
class ReferenceConfig(Config):
    """What DPO and KTO share. A number that only some losses take is a flag of the same name."""

    beta: float = flag(0.1, "price of moving away from the reference", POSITIVE)
    ref_model_name_or_path: str | None = flag(
        None, "another model as the reference", idle=lambda c: not compares(c.loss))
    precompute_ref_log_probs: bool = flag(
        False, "reference log-probs of all data before step 1",
        idle=lambda c: not compares(c.loss) or not (c.use_peft or c.ref_model_name_or_path))

    @property
    def loss(self):
        return self.losses[self.loss_type]


@dataclass
class DPOConfig(ReferenceConfig):
    losses = DPO_LOSSES
    loss_type: str = flag("sigmoid", "see losses.py", choices=DPO_LOSSES)
    label_smoothing: float = flag(
        0.0, "probability that a pair is the wrong way round",
        ("be at least 0 and below 0.5", lambda x: 0 <= x < 0.5))
    rpo_alpha: float = flag(0.0, "weight of the chosen reply's own SFT loss", NOT_NEGATIVE)
    simpo_gamma: float = flag(0.5, "the margin that simpo asks for", NOT_NEGATIVE)


@dataclass
class KTOConfig(ReferenceConfig):
    losses = KTO_LOSSES
    loss_type: str = flag("kto", "see losses.py", choices=KTO_LOSSES)
    desirable_weight: float = flag(1.0, "of thumbs up", NOT_NEGATIVE)
    undesirable_weight: float = flag(1.0, "of thumbs down", NOT_NEGATIVE)
# fmt: on


class Parser(HfArgumentParser):
    def add_argument(self, *names, must=None, idle=None, free=None, **how):
        """argparse gets what it knows of a flag."""
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
            if bool in kinds:  # the scripts take a value after it; here that may be a directory
                how = {"action": "store_true"}
            parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **how)


def parse(kind: type[Config], argv: list[str], built_in: dict) -> Config:
    """argv -> a checked config.

    `built_in` holds a script's own settings: they are the defaults where no model is given.
    """
    names = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    given = Counter(name.removeprefix("no_") for name in names)  # --learning-rate is a flag too
    parser = Parser(kind, allow_abbrev=False, description=sys.modules["__main__"].__doc__)
    if not given.keys() & {"model_name_or_path", "adapter_name_or_path"}:
        parser.set_defaults(**built_in)
    cfg = kind(**vars(parser.parse_args(argv)))
    for name in given - Counter(set(given)):  # argparse would take the last one
        raise InputError(f"--{name} is given {given[name]} times; expected once")
    check(cfg, set(given))
    return cfg


def check(cfg: Config, given: set[str]) -> None:
    """Impossible values and contradictions raise InputError; idle flags are one printed line."""
    for f in fields(cfg):
        value, must = getattr(cfg, f.name), f.metadata["must"]
        if isinstance(value, float) and not math.isfinite(value):
            must = "be a finite number", math.isfinite
        if must and value is not None and not must[1](value):
            raise InputError(f"--{f.name} {value}: must {must[0]}")
    if cfg.seed >= 2**63:
        raise InputError(f"--seed {cfg.seed}: must be less than 2**63")

    pairs = ("bf16", "fp16"), ("warmup_ratio", "warmup_steps"), ("eval_dataset", "eval_fraction")
    # Generation would not find the weights gathered, nor has a compiled layer room for doing it.
    pairs += ("fsdp", "generate_during_eval"), ("fsdp", "torch_compile")
    wrong = [pair for pair in pairs if all(getattr(cfg, name) for name in pair)]
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(cfg, name):
            if cfg.dtype not in ("auto", dtype):
                wrong.append((name, f"dtype {cfg.dtype}"))
            cfg.dtype = dtype
    if cfg.fsdp and cfg.optim == "paged_adamw_32bit":  # which knows no parts of a weight
        wrong.append(("fsdp", "optim paged_adamw_32bit"))
    if not cfg.use_peft:
        needs_lora = given & {"use_rslora", "adapter_name_or_path"}
        needs_lora |= {name for name in given if name.startswith("lora_")}
        if cfg.load_in_4bit:  # such weights can't train
            needs_lora.add("load_in_4bit")
        wrong += [("use_peft false", name) for name in sorted(needs_lora)]
    for first, second in wrong:
        raise InputError(f"--{first} and --{second} contradict each other; give one of them")
    if not cfg.model_name_or_path and not cfg.adapter_name_or_path:
        raise InputError("--model_name_or_path: give the model to train")
    if not cfg.dataset_name:
        raise InputError("--dataset_name: give the data to train on")
    ranks.check_device(cfg.device)

    idle = {f.name for f in fields(cfg) if "idle" in f.metadata and f.metadata["idle"](cfg)}
    if isinstance(cfg, ReferenceConfig):  # the numbers of losses that were not chosen
        idle |= set().union(*map(needs, cfg.losses.values())) - needs(cfg.loss) - {"beta"}
        if unknown := needs(cfg.loss) - INPUTS - vars(cfg).keys():
            name = min(unknown)
            raise InputError(f"--loss_type {cfg.loss_type}: its number {name} is no flag yet")
    for name in sorted(given & idle):
        print(f"--{name} has nothing to do in this run")
    cfg.fsdp = cfg.fsdp and ranks.LAUNCHED  # one process has nobody to share with
    if cfg.fsdp and not ranks.CAN_SHARD:
        raise InputError("--fsdp: needs torch 2.13 or a newer one")
