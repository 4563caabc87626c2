"""The flags: one dataclass a script, one line a flag.

Names and defaults are those that users of TRL type from habit. `parse` reads the command line: an
unknown or abbreviated flag, an impossible value and two flags that contradict each other end the
program with one line and exit code 2; a flag that has nothing to do in this run is one printed
line.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from transformers import HfArgumentParser

from nanoalign import InputError
from nanoalign.formats.templates import TEMPLATES
from nanoalign.formats.weights import FORMATS
from nanoalign.losses import DPO_LOSSES, KTO_LOSSES


def flag(default, help: str, **more):
    """A dataclass field with its line of --help."""
    meta = {"help": help, **more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class Config:
    """What the three scripts share."""

    # model
    model_name_or_path: str | None = flag(
        None, "directory, hub id or .gguf file; none: the built-in model"
    )
    adapter_name_or_path: str | None = flag(
        None, "adapter to go on from; the reference is that adapter"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "of the frozen weights and of computing; auto: the checkpoint's"
    )
    bf16: bool = flag(False, "the same as --dtype bfloat16")
    fp16: bool = flag(False, "float16 with dynamic loss scaling, for GPUs without bfloat16")
    device: str = flag("auto", "cpu, cuda, mps; auto: the best there is")
    chat_template: str = flag(
        "chatml", "native: the tokenizer's own template", choices=list(TEMPLATES)
    )
    trust_remote_code: bool = flag(False, "run code that comes with the model")
    # QLoRA
    load_in_4bit: bool = flag(False, "hold the frozen linear layers in 4 bits (nf4.py)")
    use_bnb_nested_quant: bool = flag(False, "quantize their scales too: 4.13 bits, not 4.50")
    bnb_4bit_quant_type: str = flag("nf4", "the frozen format", choices=FORMATS)
    # LoRA
    use_peft: bool = flag(True, "LoRA; false trains all weights")
    lora_r: int = flag(16, "rank of the change")
    lora_alpha: float = flag(16, "its scale: alpha / r")
    lora_dropout: float = flag(0.05, "dropout before A")
    lora_target_modules: list[str] = flag(["all-linear"], "names, a regex, or all-linear")
    lora_modules_to_save: list[str] = flag([], "modules that train whole, lm_head say")
    lora_bias: Literal["none", "lora_only", "all"] = flag("none", "the biases that train")
    use_rslora: bool = flag(False, "scale by alpha / sqrt(r)")
    # data
    dataset_name: list[str] = flag([], "JSON, JSONL or CSV files, or a data set of the hub")
    dataset_train_split: str = flag("train", "split of a hub data set to train on")
    dataset_test_split: str = flag("test", "split of a hub data set to evaluate on")
    eval_dataset: list[str] = flag([], "files to evaluate on")
    eval_fraction: float = flag(0.0, "share of the training rows to hold out for evaluation")
    shuffle_dataset: bool = flag(True, "a new order in each epoch")
    input_as_system: bool = flag(False, "the column `input` holds the system turn")
    max_length: int = flag(
        1024, "tokens of prompt and completion; completions are cut from the right"
    )
    max_prompt_length: int | None = flag(None, "tokens of the prompt")
    truncation_mode: Literal["keep_end", "keep_start"] = flag(
        "keep_end", "what stays of a longer prompt"
    )
    # training
    output_dir: str | None = flag(None, "where everything goes")
    resume_from_checkpoint: str | None = flag(
        None,
        "go on from the newest checkpoint of output_dir, or from this one",
        nargs="?",
        const="last",
    )
    overwrite_output_dir: bool = flag(False, "use an output_dir that is not empty")
    per_device_train_batch_size: int = flag(8, "examples a micro-batch")
    per_device_eval_batch_size: int = flag(8, "examples an evaluation batch")
    gradient_accumulation_steps: int = flag(1, "micro-batches an optimizer step")
    max_row_tokens: int | None = flag(
        None, "a micro-batch with more is cut in rows of this many: less memory; none: by device"
    )
    num_train_epochs: float = flag(3.0, "passes over the data")
    max_steps: int = flag(-1, "optimizer steps; overrides num_train_epochs")
    learning_rate: float = flag(1e-6, "the highest learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = flag("linear", "after the warm-up")
    warmup_ratio: float = flag(0.0, "share of the steps in which the learning rate rises from 0")
    warmup_steps: int = flag(0, "the same as a number of steps")
    optim: Literal["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"] = flag(
        "adamw_torch", "AdamW"
    )
    weight_decay: float = flag(0.0, "AdamW's, on matrices and vectors alike")
    adam_beta1: float = flag(0.9, "AdamW's")
    adam_beta2: float = flag(0.999, "AdamW's")
    max_grad_norm: float = flag(1.0, "clip the gradient's norm to this; 0: don't")
    gradient_checkpointing: bool = flag(
        False, "recompute activations in backward: less memory, slower"
    )
    torch_compile: bool = flag(False, "compile the layers: a slow first step, then faster ones")
    disable_dropout: bool = flag(True, "no dropout anywhere")
    seed: int = flag(42, "of weights, order and dropout")
    # watching
    logging_steps: int = flag(10, "steps between two lines of metrics")
    logging_first_step: bool = flag(False, "a line for step 1 too")
    eval_steps: int | None = flag(None, "steps between two evaluations; none: at the end")
    generate_during_eval: bool = flag(False, "show replies to held-out prompts at evaluation")
    save_steps: int | None = flag(500, "steps between two checkpoints")
    save_total_limit: int | None = flag(None, "keep only the newest checkpoints")
    skip_nonfinite: int = flag(0, "pass over this many steps whose loss or gradient is not finite")
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", "metrics go there as well")


@dataclass
class SFTConfig(Config):
    learning_rate: float = flag(2e-5, "the highest learning rate")
    disable_dropout: bool = flag(False, "no dropout anywhere")
    neftune_noise_alpha: float = flag(0.0, "noise on the embeddings, 5 say (arXiv 2310.05914)")


@dataclass
class ReferenceConfig(Config):
    """What DPO and KTO share."""

    beta: float = flag(0.1, "price of moving away from the reference")
    ref_model_name_or_path: str | None = flag(None, "another model as the reference")
    precompute_ref_log_probs: bool = flag(False, "reference log-probs of all data before step 1")


@dataclass
class DPOConfig(ReferenceConfig):
    loss_type: str = flag("sigmoid", "see losses.py", choices=list(DPO_LOSSES))
    label_smoothing: float = flag(0.0, "probability that a pair is the wrong way round")
    rpo_alpha: float = flag(0.0, "weight of the chosen reply's own SFT loss")


@dataclass
class KTOConfig(ReferenceConfig):
    loss_type: str = flag("kto", "see losses.py", choices=list(KTO_LOSSES))
    desirable_weight: float = flag(1.0, "of thumbs up")
    undesirable_weight: float = flag(1.0, "of thumbs down")


class Parser(HfArgumentParser):
    def error(self, message):  # argparse prints forty lines of usage before it
        raise InputError(f"{message} (--help lists the flags)")


def parse(kind: type[Config], argv: list[str], builtin: dict) -> Config:
    """argv -> a checked config.

    `builtin` holds the settings of the built-in run; they are the defaults where no model is given.
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
        for name, value in builtin.items():
            if name not in given:
                setattr(cfg, name, value)
    check(cfg, given)
    return cfg


def check(cfg: Config, given: set[str]) -> None:
    """Impossible values and contradictions raise InputError; idle flags are one printed line."""
    positive = ("lora_r", "lora_alpha", "max_length", "per_device_train_batch_size",
                "logging_steps", "per_device_eval_batch_size", "gradient_accumulation_steps",
                "num_train_epochs", "max_prompt_length", "eval_steps", "save_steps",
                "save_total_limit", "beta", "max_row_tokens")  # fmt: skip
    zero_up = ("skip_nonfinite", "warmup_steps", "weight_decay", "max_grad_norm", "learning_rate",
               "rpo_alpha", "neftune_noise_alpha", "desirable_weight", "undesirable_weight",
               "seed")  # fmt: skip
    shares = {"eval_fraction": 1.0, "warmup_ratio": None, "lora_dropout": 1.0, "adam_beta1": 1.0,
              "adam_beta2": 1.0, "label_smoothing": 0.5}  # fmt: skip
    for name, value in vars(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} {value}: must be a finite number")
        if name in positive and value is not None and not value > 0:
            raise InputError(f"--{name} {value}: must be more than 0")
        if name in zero_up and not value >= 0:
            raise InputError(f"--{name} {value}: must not be negative")
        if name in shares and not 0 <= value < (shares[name] or 1.0 + 1e-12):
            limit = f"below {shares[name]}" if shares[name] else "at most 1"
            raise InputError(f"--{name} {value}: must be at least 0 and {limit}")

    def contradiction(first: str, second: str):
        raise InputError(f"--{first} and --{second} contradict each other; give one of them")

    if cfg.bf16 and cfg.fp16:
        contradiction("bf16", "fp16")
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(cfg, name) and cfg.dtype not in ("auto", dtype):
            contradiction(name, f"dtype {cfg.dtype}")
    if cfg.warmup_ratio and cfg.warmup_steps:
        contradiction("warmup_ratio", "warmup_steps")
    if cfg.eval_dataset and cfg.eval_fraction:
        contradiction("eval_dataset", "eval_fraction")
    if not cfg.use_peft:
        for name in sorted(given):
            if name.startswith("lora_") or name in ("use_rslora", "adapter_name_or_path"):
                contradiction("use_peft false", name)
        if cfg.load_in_4bit:  # 4-bit weights can't train
            contradiction("use_peft false", "load_in_4bit")
    cfg.dtype = "bfloat16" if cfg.bf16 else "float16" if cfg.fp16 else cfg.dtype
    if not cfg.dataset_name:
        raise InputError("--dataset_name: give the data to train on")
    if cfg.max_steps < 1 and cfg.max_steps != -1:
        raise InputError(f"--max_steps {cfg.max_steps}: must be more than 0, or -1 for epochs")
    if cfg.seed >= 2**63:
        raise InputError(f"--seed {cfg.seed}: must be less than 2**63")

    def files(sources):  # no data set of the hub, which has splits
        return all(source.lower().endswith((".json", ".jsonl", ".csv")) for source in sources)

    evaluates = bool(cfg.eval_dataset or cfg.eval_fraction)
    goes_on = cfg.adapter_name_or_path is not None  # with the adapter's own r, alpha, targets ...
    idle = {
        "eval_steps": not evaluates,
        "generate_during_eval": cfg.generate_during_eval and not evaluates,
        "per_device_eval_batch_size": not evaluates,
        "dataset_train_split": files(cfg.dataset_name),
        "dataset_test_split": files(cfg.eval_dataset),
        "truncation_mode": cfg.max_prompt_length is None,
        "lora_r": goes_on,
        "lora_alpha": goes_on,
        "lora_dropout": goes_on or (cfg.disable_dropout and cfg.lora_dropout > 0),
        "lora_target_modules": goes_on,
        "lora_modules_to_save": goes_on,
        "lora_bias": goes_on,
        "use_rslora": goes_on,
        "num_train_epochs": cfg.max_steps > 0,
        "logging_first_step": cfg.logging_first_step and cfg.logging_steps == 1,
        "overwrite_output_dir": cfg.overwrite_output_dir and cfg.resume_from_checkpoint is not None,
        "use_bnb_nested_quant": not cfg.load_in_4bit,
        "bnb_4bit_quant_type": not cfg.load_in_4bit,
    }
    if isinstance(cfg, DPOConfig):
        idle["label_smoothing"] = cfg.loss_type not in ("sigmoid", "robust")
    if isinstance(cfg, ReferenceConfig):
        table = not cfg.use_peft and not cfg.ref_model_name_or_path  # computed anyway
        idle["precompute_ref_log_probs"] = cfg.precompute_ref_log_probs and table
    for name in sorted(given):
        if idle.get(name):
            print(f"--{name} has nothing to do in this run")
    if cfg.optim == "paged_adamw_32bit":
        print("--optim paged_adamw_32bit: plain AdamW is used until paging exists here")
