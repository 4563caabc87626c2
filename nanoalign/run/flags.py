"""The flags: a dataclass for each script, a field for each flag.

Names and meanings are those of TRL; README lists the defaults that differ. A field says all about
its flag: type, default, help, bounds, and when it has no effect. `parse` reads the command line. It
raises InputError for an unknown or abbreviated flag, an impossible value, and two flags that
contradict each other. It prints a line for a flag that has no effect in this run.

FOREIGN lists flags of TRL and transformers that do not exist here. It says which flag does the
same, or why none is needed.
"""

import difflib
import json
import math
import os
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import transformers
import yaml  # it comes with transformers
from transformers import HfArgumentParser

from nanoalign import InputError
from nanoalign.formats.rows import storage
from nanoalign.formats.templates import TEMPLATES
from nanoalign.formats.weights import FORMATS
from nanoalign.losses import DPO_LOSSES, INPUTS, KTO_LOSSES, compares, needs
from nanoalign.run import ranks

# Bounds: words for the error ("must be more than 0"), and a test of the value.
POSITIVE = "be more than 0", lambda x: x > 0
NOT_NEGATIVE = "not be negative", lambda x: x >= 0
SHARE = "be at least 0 and below 1", lambda x: 0 <= x < 1

# schedule -> the names in lr_scheduler_kwargs that it takes
SCHEDULES = {
    "linear": (),
    "cosine": (),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("power", "lr_end"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": (),
}

# fmt: off
# Flags of transformers and TRL that do not exist here: their names; the values that change nothing
# ("any": all of them); why, or what to use for the other values.
FOREIGN = [
    ("dataset_num_proc dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor "
     "dataloader_persistent_workers", "any", "an example is made when it is needed, in 0.1 ms"),
    ("remove_unused_columns ignore_bias_buffers eval_accumulation_steps precompute_ref_batch_size",
     "any", "nothing here needs it"),
    ("padding_free pad_to_multiple_of group_by_length packing_strategy eval_packing pad_token",
     "any", "a batch is one row without padding"),
    ("attn_implementation use_liger_kernel use_cache", "any", "model and device decide"),
    ("gradient_checkpointing_kwargs", "any", "it is never reentrant"),
    ("ddp_find_unused_parameters ddp_backend ddp_timeout local_rank", "any", "torchrun's processes "
     "add their gradients up themselves"),
    ("log_level disable_tqdm logging_nan_inf_filter", "any", "a run says little"),
    ("include_num_input_tokens_seen include_tokens_per_second", "any", "both are logged"),
    ("logging_dir", "any", "TensorBoard's events go to --output_dir"),
    ("do_eval", "any", "evaluation is done where there is --eval_dataset or --eval_fraction"),
    ("do_train average_tokens_across_devices save_safetensors", "true", "this is always on"),
    ("do_predict", "false", "python -m nanoalign.chat replies"),
    ("logging_strategy", "steps", "--logging_steps says how often"),
    ("data_seed", "", "--seed is for the order of the data too"),
    ("save_only_model", "false", "with --save_strategy no there is only the model, at the end"),
    ("push_to_hub hub_model_id hub_strategy hub_token hub_private_repo", "false every_save",
     "hf upload OWNER/NAME OUTPUT_DIR puts it on the hub"),
    ("optim_args", "", "AdamW has --adam_beta1, --adam_beta2, --adam_epsilon, --weight_decay"),
    ("use_cpu no_cuda", "false", "--device cpu does that"),
    ("fp16_full_eval bf16_full_eval", "false", "evaluation computes in --dtype, as training does"),
    ("bnb_4bit_compute_dtype bnb_4bit_quant_storage", "", "--dtype is for 4-bit models too"),
    ("activation_checkpointing activation_offloading", "false", "--gradient_checkpointing does it"),
    ("auto_find_batch_size", "false", "--max_row_tokens cuts what would not fit"),
    ("deepspeed fsdp_config", "", "--fsdp cuts the model between GPUs"),
    ("model_init_kwargs", "", "--dtype and --trust_remote_code are flags"),
    ("model_revision", "main", "hf download MODEL --revision R gives a directory"),
    ("load_in_8bit", "false", "--load_in_4bit is there"),
    ("lora_task_type", "causal_lm", "every model here is a causal one"),
    ("lora_target_parameters", "", "--lora_target_modules takes linear layers"),
    ("dataset_config dataset_streaming", "false", "datasets writes it as JSONL: .to_json(FILE)"),
    ("dataset_text_field dataset_kwargs", "text", "README has the columns that are read"),
    ("max_completion_length", "", "--max_length is for prompt and completion together"),
    ("chat_template_path", "", "--chat_template native is the tokenizer's own"),
    ("eos_token", "", "the chat template says what ends a reply"),
    ("packing", "false", "a batch is one row already, --per_device_train_batch_size examples"),
    ("completion_only_loss assistant_only_loss", "true", "only the assistant's replies train"),
    ("label_smoothing_factor", "0 0.0", "DPO has --label_smoothing"),
    ("loss_weights ld_alpha", "", "--rpo_alpha adds the chosen reply's own loss"),
    ("dataloader_drop_last", "false", "an epoch's last step takes what is left"),
    ("train_sampling_strategy", "random", "--shuffle_dataset false keeps the file's order"),
    ("use_dora sync_ref_model ref_model_mixup_alpha ref_model_sync_steps f_divergence_type "
     "f_alpha_divergence_coef use_weighting discopop_tau", "false 0.6 512 reverse_kl 0.5 0.05",
     "nothing here does the same"),
    ("env", "", "write it before the command: NAME=VALUE python ..."),
]
# fmt: on


def flag(default, help: str, must=None, **more):
    """A dataclass field for a flag, with its line of --help.

    must: bounds, such as POSITIVE. idle: a function that says whether the flag has no effect with a
    config. free: a resumed run may change the flag, because it changes results only by rounding.
    Other keywords go to argparse.
    """
    meta = {"help": help, "must": must, **more}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=meta)
    return field(default=default, metadata=meta)


def has_adapter(cfg) -> bool:
    """Is an adapter continued? It has its own r, alpha and target modules."""
    return cfg.adapter_name_or_path is not None


def no_evaluation(cfg) -> bool:
    return cfg.eval_strategy == "no" or not (cfg.eval_dataset or cfg.eval_fraction)


def no_choice(cfg) -> bool:
    return not (cfg.load_best_model_at_end or cfg.early_stopping_patience)


def no_warmup(cfg) -> bool:
    """transformers' schedule "constant" has no warm-up."""
    return cfg.lr_scheduler_type == "constant"


def floats(text: str) -> dict[str, float]:
    """'{"num_cycles": 3}' -> {"num_cycles": 3.0}"""
    try:
        read = {name: float(number) for name, number in yaml.safe_load(text).items()}
        if all(map(math.isfinite, read.values())):
            return read
    except (yaml.YAMLError, AttributeError, TypeError, ValueError):
        pass
    raise ArgumentTypeError(f"""{text}: expected numbers by name, '{{"num_cycles": 3}}' say""")


def json_object(text: str) -> dict:
    with suppress(ValueError):
        if isinstance(read := json.loads(text), dict):
            return read
    raise ArgumentTypeError(f"{text}: expected a JSON object, '{{\"enable_thinking\": false}}' say")


# fmt: off
@dataclass
class Config:
    """What the three scripts share."""

    # model
    model_name_or_path: str | None = flag(None, "directory, hub id or .gguf; none: the built-in")
    adapter_name_or_path: str | None = flag(None, "adapter to continue; it is the reference too")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "of the frozen weights and of what is computed; auto: as in the checkpoint",
        aliases="--torch_dtype")
    bf16: bool = flag(False, "the same as --dtype bfloat16")
    fp16: bool = flag(False, "the same as --dtype float16: for GPUs without bfloat16")
    device: str = flag("auto", "cpu, cuda or mps; auto: a GPU if there is one")
    tf32: bool = flag(
        True, "on CUDA, float32 products use 10 bits of a factor: much faster",
        idle=lambda c: c.device in ("cpu", "mps"), free=True)
    threads: int | None = flag(
        None, "of a CPU; none: OMP_NUM_THREADS, else one a core or a single one, by a short test",
        POSITIVE, free=True)
    chat_template: str | None = flag(
        None, "native: the tokenizer's own template; none: texts as they are; default: the one "
        "that training saved, else the tokenizer's own, else chatml", choices=TEMPLATES)
    chat_template_kwargs: dict = flag(
        {}, "JSON for the native template: '{\"enable_thinking\": false}'", read=json_object)
    trust_remote_code: bool = flag(False, "run code that comes with the model")
    # QLoRA
    load_in_4bit: bool = flag(False, "hold the frozen linear layers in 4 bits (nf4.py)")
    use_bnb_nested_quant: bool = flag(
        False, "quantize the scales too: 4.13 bits a weight, not 4.50",
        idle=lambda c: not c.load_in_4bit)
    bnb_4bit_quant_type: str = flag(
        "nf4", "the 4-bit format", choices=FORMATS, idle=lambda c: not c.load_in_4bit)
    # LoRA
    use_peft: bool = flag(True, "LoRA; false trains all weights")
    lora_r: int = flag(16, "rank of LoRA", POSITIVE, idle=has_adapter)
    lora_alpha: float = flag(16, "LoRA's scale is alpha / r", POSITIVE, idle=has_adapter)
    lora_dropout: float = flag(
        0.05, "dropout before LoRA's A", SHARE,
        idle=lambda c: has_adapter(c) or (c.disable_dropout and c.lora_dropout > 0))
    lora_target_modules: list[str] = flag(
        ["all-linear"], "layers that get LoRA: names or a regex", idle=has_adapter)
    lora_modules_to_save: list[str] = flag([], "modules whose weights all train", idle=has_adapter)
    lora_bias: Literal["none", "lora_only", "all"] = flag(
        "none", "which biases train", idle=has_adapter)
    use_rslora: bool = flag(False, "scale by alpha / sqrt(r)", idle=has_adapter)
    # data
    dataset_name: list[str] = flag([], "files (JSON, JSONL, CSV, Parquet) or a data set of the hub")
    dataset_train_split: str = flag(
        "train", "split of a hub data set",
        idle=lambda c: {*map(storage, c.dataset_name)} <= {"file"})
    dataset_test_split: str = flag(
        "test", "its split to evaluate on",
        idle=lambda c: {*map(storage, c.eval_dataset)} <= {"file"})
    eval_dataset: list[str] = flag([], "files to evaluate on")
    eval_fraction: float = flag(0.0, "share of the rows held out for evaluation", SHARE)
    shuffle_dataset: bool = flag(True, "a new order in each epoch")
    input_as_system: bool = flag(False, "the column `input` is the system turn")
    train_on_thoughts: bool = flag(True, "false: thoughts are context only")
    skip_bad_rows: int = flag(
        0, "skip up to so many rows that can't be read, and name each", NOT_NEGATIVE, free=True)
    max_length: int = flag(
        1024, "tokens of prompt and completion; a longer one loses its end", POSITIVE,
        aliases="--max_seq_length")
    max_prompt_length: int | None = flag(None, "tokens of the prompt; none: no limit", POSITIVE)
    truncation_mode: Literal["keep_end", "keep_start"] = flag(
        "keep_end", "what stays of a longer prompt", idle=lambda c: c.max_prompt_length is None)
    # training
    output_dir: str | None = flag(None, "where the run writes everything", free=True)
    resume_from_checkpoint: str | None = flag(
        None, "continue from the newest checkpoint in output_dir, or from this one",
        nargs="?", const="last", free=True)
    overwrite_output_dir: bool = flag(
        False, "use output_dir even if it has files; an earlier run's files are deleted", free=True)
    per_device_train_batch_size: int = flag(
        8, "examples in a micro-batch, on each device", POSITIVE, free=True)
    per_device_eval_batch_size: int = flag(
        8, "examples in an evaluation batch", POSITIVE, idle=no_evaluation, free=True)
    gradient_accumulation_steps: int = flag(
        1, "micro-batches in an optimizer step, on each device", POSITIVE, free=True)
    max_row_tokens: int | None = flag(
        None, "split micro-batches with more tokens; none: what fits in a GPU's memory", POSITIVE,
        free=True)
    num_train_epochs: float = flag(
        3.0, "passes over the data", POSITIVE, idle=lambda c: c.max_steps > 0)
    max_steps: int = flag(
        -1, "optimizer steps; overrides num_train_epochs",
        ("be more than 0, or -1 for epochs", lambda n: n > 0 or n == -1))
    learning_rate: float = flag(1e-6, "the highest learning rate", NOT_NEGATIVE)
    lr_scheduler_type: str = flag("linear", "schedule after the warm-up", choices=SCHEDULES)
    lr_scheduler_kwargs: dict = flag(
        {}, "JSON: num_cycles of cosine_with_restarts; power, lr_end of polynomial", read=floats)
    warmup_ratio: float = flag(
        0.0, "share of the steps in which the learning rate rises from 0",
        ("be at least 0 and at most 1", lambda x: 0 <= x <= 1), idle=no_warmup)
    warmup_steps: float = flag(
        0, "the same as a number of steps; below 1 a share", NOT_NEGATIVE, idle=no_warmup)
    optim: Literal["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"] = flag(
        "adamw_torch", "AdamW; paged keeps its states in the CPU's memory, for full fine-tuning",
        idle=lambda c: c.optim == "paged_adamw_32bit" and c.device == "cpu", free=True)
    weight_decay: float = flag(0.0, "AdamW's, for all trained weights", NOT_NEGATIVE)
    adam_beta1: float = flag(0.9, "AdamW's", SHARE)
    adam_beta2: float = flag(0.999, "AdamW's", SHARE)
    adam_epsilon: float = flag(1e-8, "AdamW's", NOT_NEGATIVE)
    router_aux_loss_coef: float | None = flag(
        None, "weight of a mixture's load-balancing loss; none: the model's own; 0: without it",
        NOT_NEGATIVE)
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm; 0: don't", NOT_NEGATIVE)
    gradient_checkpointing: bool | None = flag(
        None, "less memory, slower: activations are recomputed; none: if a GPU needs it",
        nargs="?", const=True, free=True)
    fsdp: bool = flag(
        False, "cut the model between torchrun's processes",
        idle=lambda c: not ranks.LAUNCHED, free=True)
    torch_compile: bool | None = flag(
        None, "compile the layers: slow first steps, then faster ones; none: on GPUs that can",
        nargs="?", const=True, free=True)
    disable_dropout: bool = flag(True, "no dropout anywhere")
    plain: bool = flag(
        False, "compute with the definitions of the lesson, not with the fast twins: slow",
        free=True)
    seed: int = flag(42, "of new weights, order and dropout", NOT_NEGATIVE)
    # watching
    logging_steps: int = flag(10, "steps between two lines of metrics", POSITIVE, free=True)
    logging_first_step: bool = flag(
        False, "a line for step 1 too", idle=lambda c: c.logging_steps == 1, free=True)
    eval_strategy: Literal["no", "steps", "epoch"] | None = flag(
        None, "when to evaluate before the end; none: at eval_steps; no: never", free=True,
        aliases="--evaluation_strategy")
    eval_steps: int | None = flag(
        None, "steps between evaluations; none: only at the end", POSITIVE,
        idle=lambda c: no_evaluation(c) or c.eval_strategy == "epoch", free=True)
    eval_on_start: bool = flag(False, "evaluate before step 1 too", free=True)
    load_best_model_at_end: bool = flag(
        False, "save the weights of the best evaluation, not the last ones", free=True)
    metric_for_best_model: str | None = flag(
        None, "the metric that decides which is the best; none: loss", idle=no_choice, free=True)
    greater_is_better: bool | None = flag(
        None, "is a greater one better? none: unless it ends in loss", nargs="?", const=True,
        idle=no_choice, free=True)
    early_stopping_patience: int | None = flag(
        None, "end the run after so many evaluations without a new best", POSITIVE, free=True)
    generate_during_eval: bool = flag(
        False, "show replies to held-out prompts at each evaluation", idle=no_evaluation, free=True)
    save_strategy: Literal["no", "steps", "epoch"] = flag(
        "steps", "when to write checkpoints; no: only if the run is stopped", free=True)
    save_steps: int = flag(
        500, "steps between two checkpoints; 0: only if the run is stopped", NOT_NEGATIVE,
        idle=lambda c: c.save_strategy != "steps", free=True)
    save_total_limit: int | None = flag(None, "newest checkpoints to keep", POSITIVE, free=True)
    skip_nonfinite: int = flag(
        0, "skip this many steps whose loss or gradient is not finite", NOT_NEGATIVE,
        free=True)
    report_to: Literal["none", "tensorboard", "wandb"] = flag(
        "none", "send metrics there as well", free=True)
    run_name: str | None = flag(
        None, "the run's name at wandb; none: output_dir's", idle=lambda c: c.report_to != "wandb",
        free=True)

    @property
    def method(self) -> str:
        """"dpo" for DPOConfig. It is shown in run.json and in the model card."""
        return type(self).__name__.removesuffix("Config").lower()

    @property
    def per_step(self) -> int:
        """Examples in an optimizer step, on all devices together."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * ranks.WORLD

    @property
    def computing_dtype(self) -> str:
        """The dtype of --dtype, --bf16 or --fp16."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else self.dtype

    @property
    def sharded(self) -> bool:
        """--fsdp, if there are several processes to share the model."""
        return self.fsdp and ranks.LAUNCHED


@dataclass
class SFTConfig(Config):
    learning_rate: float = flag(2e-5, "the highest learning rate", NOT_NEGATIVE)
    disable_dropout: bool = flag(False, "no dropout anywhere")
    train_on: Literal["every_reply", "last_reply"] = flag(
        "every_reply", "which of a conversation's replies train")
    neftune_noise_alpha: float = flag(
        0.0, "noise on the embeddings, often 5 (arXiv 2310.05914)", NOT_NEGATIVE)


@dataclass
class ReferenceConfig(Config):
    """What DPO and KTO share. The flags of a loss have the names of its parameters (losses.py)."""

    beta: float = flag(0.1, "a higher one keeps the policy closer to the reference", POSITIVE)
    ref_model_name_or_path: str | None = flag(
        None, "another model or adapter as the reference", idle=lambda c: not compares(c.loss))
    precompute_ref_log_probs: bool = flag(
        False, "compute all reference log-probs before step 1",
        idle=lambda c: not compares(c.loss) or not (c.use_peft or c.ref_model_name_or_path))

    @property
    def loss(self):
        return self.losses[self.loss_type]


@dataclass
class DPOConfig(ReferenceConfig):
    losses = DPO_LOSSES
    loss_type: str = flag("sigmoid", "see losses.py", choices=DPO_LOSSES)
    label_smoothing: float = flag(
        0.0, "probability that chosen and rejected are swapped",
        ("be at least 0 and below 0.5", lambda x: 0 <= x < 0.5))
    rpo_alpha: float = flag(0.0, "weight of the chosen reply's own SFT loss", NOT_NEGATIVE)
    simpo_gamma: float = flag(0.5, "the margin that simpo asks for", NOT_NEGATIVE)


@dataclass
class KTOConfig(ReferenceConfig):
    losses = KTO_LOSSES
    loss_type: str = flag("kto", "see losses.py", choices=KTO_LOSSES)
    desirable_weight: float = flag(1.0, "weight of thumbs up", NOT_NEGATIVE)
    undesirable_weight: float = flag(1.0, "weight of thumbs down", NOT_NEGATIVE)
# fmt: on


class Parser(HfArgumentParser):
    def add_argument(self, *names, must=None, idle=None, free=None, read=None, **more):
        """Leave out what argparse does not know."""
        return super().add_argument(*names, **more | ({"type": read} if read else {}))

    def parse_args(self, *args):
        """Expand ~ in paths: a shell does not do it in --output_dir=~/out."""

        def home(value):
            if isinstance(value, list):
                return [home(one) for one in value]
            path = isinstance(value, (str, Path))
            return type(value)(os.path.expanduser(value)) if path else value

        parsed, texts = vars(super().parse_args(*args)), ("prompt", "system")
        return Namespace(**{k: v if k in texts else home(v) for k, v in parsed.items()})

    def error(self, message):  # argparse prints forty lines of usage before it
        raise InputError(f"{message} (--help lists the flags)")


def add_flags(parser: ArgumentParser, *names: str) -> None:
    """Add these flags of the scripts to a tool's parser, with type, default, choices and help."""
    for f in fields(SFTConfig):
        if f.name in names:
            kinds = get_args(f.type) or (f.type,)  # the words of a Literal; int of int | None
            words = kinds if get_origin(f.type) is Literal else f.metadata.get("choices")
            more = {"choices": words} if words else {"type": f.metadata.get("read", kinds[0])}
            if bool in kinds:  # no value: the next word may be a tool's directory
                more = {"action": "store_true"}
            default = {} if f.default is MISSING else f.default
            parser.add_argument(f"--{f.name}", default=default, help=f.metadata["help"], **more)


def parse(kind: type[Config], argv: list[str], built_in: dict) -> Config:
    """argv -> a checked config. `built_in`: the defaults of a script if no model is given."""
    parser = Parser(kind, allow_abbrev=False, description=sys.modules["__main__"].__doc__)
    parser.add_argument("--config", help="a YAML file of flags; those of the command line win")
    typed, in_file, line_of = by_flag(argv), {}, {}
    if "config" in typed:
        in_file, line_of = from_file(kind, parser.parse_args(typed.pop("config")).config)
    words = in_file | typed
    if not words.keys() & {"model_name_or_path", "adapter_name_or_path"}:
        parser.set_defaults(**built_in)
    try:
        values = vars(parser.parse_args(known_words(kind, words)))
        cfg = kind(**{f.name: values[f.name] for f in fields(kind)})
        check(cfg, set(words))
    except InputError as error:
        named = [n for n in re.findall(r"--(\w+)", str(error)) if n in line_of.keys() - typed]
        raise InputError(f"{line_of[named[0]]}: {error}" if named else str(error)) from None
    return cfg


def by_flag(argv: list[str]) -> dict[str, list[str]]:
    """["--max-steps=3", "--no_use_peft"] -> {"max_steps": ["--max-steps=3"], "use_peft": [...]}"""
    words: dict[str, list[str]] = {}
    name = ""  # for words before the first flag
    for word in argv:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_").removeprefix("no_")
            if name in words:  # argparse would take the last one
                raise InputError(f"--{name} is given more than once")
        words.setdefault(name, []).append(word)
    return words


def from_file(kind: type[Config], path: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Read flags from a YAML file. -> each flag as words of a command line; the line it stands in.
    Values are taken as text, because YAML reads 1e-5 as a string and no as False. No objects are
    made, so a tag that asks for code does nothing."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"--config {path}: expected lines as learning_rate: 1e-5")
    tags = [f"tag:yaml.org,2002:{t}" for t in "str int float bool timestamp null".split()]
    optional = {f.name for f in fields(kind) if f.default is None}  # null leaves these at None
    flags, line_of = {}, {}
    for key, value in root.value:
        place = f"{path}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{place}: expected a flag")
        name = key.value.replace("-", "_")
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        texts = [item.value for item in items if item.tag in tags]
        if isinstance(value, yaml.MappingNode):
            texts = [text[value.start_mark.index : value.end_mark.index]]
        elif len(texts) < len(items):
            raise InputError(f"{place}: {name}: expected a plain value, or a list of them")
        if name in flags:
            raise InputError(f"{place}: {name} is given more than once")
        if value.tag != tags[-1] or name in names_of(kind) - optional:
            flags[name], line_of[name] = [f"--{name}", *texts], place
    return flags, line_of


def known_words(kind: type[Config], flags: dict[str, list[str]]) -> list[str]:
    """Keep the words of our own flags. A flag of FOREIGN prints a line if its value changes nothing
    here. Any other value, and an unknown flag, raises InputError."""
    words = []
    for name, said in flags.items():
        if name in names_of(kind) | {"", "help"}:
            words += said
            continue
        foreign = next((entry for entry in FOREIGN if name in entry[0].split()), None)
        if foreign is None:
            raise InputError(unknown(kind, name, said))
        _, harmless, instead = foreign
        value = " ".join(said).partition("=" if "=" in said[0] else " ")[2]
        value = value or ("false" if said[0].startswith(("--no_", "--no-")) else "true")
        if harmless == "any":
            print(f"--{name} has nothing to do here: {instead}")
        elif value.lower() not in [*harmless.split(), "none"]:
            raise InputError(f"--{name} {value}: not here; {instead}")
    return words


def names_of(kind: type[Config]) -> set[str]:
    """The names of its flags, and their older names."""
    older = {f.metadata["aliases"][2:] for f in fields(kind) if "aliases" in f.metadata}
    return older | {f.name for f in fields(kind)}


def unknown(kind: type[Config], name: str, said: list[str]) -> str:
    """The error for a flag that is neither ours nor in FOREIGN."""
    kinds = [k().method for k in (SFTConfig, DPOConfig, KTOConfig) if name in names_of(k)]
    if kinds:
        return f"--{name} is a flag of {' and '.join(map(str.upper, kinds))} only"
    theirs = Path(transformers.__file__).with_name("training_args.py")  # importing it takes seconds
    if f"\n    {name}: " in theirs.read_text(encoding="utf-8"):
        return f"--{name} is a flag of transformers' Trainer; nothing here does the same"
    near = difflib.get_close_matches(name, names_of(kind), 1)
    nearest = f"; the nearest is --{near[0]}" if near else ""
    return f"unrecognized arguments: {' '.join(said)}{nearest} (--help lists the flags)"


def check(cfg: Config, given: set[str]) -> None:
    """Raise InputError for impossible values and contradictions. Print a line for each flag in
    `given` that has no effect."""
    for f in fields(cfg):
        value, must = getattr(cfg, f.name), f.metadata["must"]
        if isinstance(value, float) and not math.isfinite(value):
            must = "be a finite number", math.isfinite
        if must and value is not None and not must[1](value):
            raise InputError(f"--{f.name} {value}: must {must[0]}")
    if cfg.seed >= 2**63:
        raise InputError(f"--seed {cfg.seed}: must be less than 2**63")

    pairs = ("bf16", "fp16"), ("warmup_ratio", "warmup_steps"), ("eval_dataset", "eval_fraction")
    # A sharded model can't generate, and the hooks that gather a layer can't be compiled.
    pairs += ("fsdp", "generate_during_eval"), ("fsdp", "torch_compile"), ("plain", "torch_compile")
    wrong = [pair for pair in pairs if all(getattr(cfg, name) for name in pair)]
    if (cfg.bf16 or cfg.fp16) and cfg.dtype not in ("auto", cfg.computing_dtype):
        wrong.append(("bf16" if cfg.bf16 else "fp16", f"dtype {cfg.dtype}"))
    if cfg.fsdp and cfg.optim == "paged_adamw_32bit":  # it can't handle DTensors
        wrong.append(("fsdp", "optim paged_adamw_32bit"))
    if not cfg.use_peft:
        settings = {f.name for f in fields(cfg) if f.metadata.get("idle") is has_adapter}
        needs_lora = given & {*settings, "lora_dropout", "adapter_name_or_path"}
        if cfg.load_in_4bit:  # 4-bit weights can't train
            needs_lora.add("load_in_4bit")
        wrong += [("use_peft false", name) for name in sorted(needs_lora)]
    for first, second in wrong:
        raise InputError(f"--{first} and --{second} contradict each other; give one of them")

    if cfg.plain and not cfg.disable_dropout:
        raise InputError("--plain: needs --disable_dropout true; the definitions have no dropout")
    if not cfg.model_name_or_path and not cfg.adapter_name_or_path:
        raise InputError("--model_name_or_path: give the model to train")
    if not cfg.dataset_name:
        raise InputError("--dataset_name: give the data to train on")
    wish = f"eval_strategy {cfg.eval_strategy}" * (cfg.eval_strategy in ("steps", "epoch"))
    for name in ("eval_on_start", "load_best_model_at_end", "early_stopping_patience"):
        wish = wish or name * bool(getattr(cfg, name))
    if wish and no_evaluation(cfg):
        raise InputError(f"--{wish}: needs --eval_dataset or --eval_fraction")

    options = SCHEDULES[cfg.lr_scheduler_type]
    if wrong := [name for name in cfg.lr_scheduler_kwargs if name not in options]:
        takes = f"{cfg.lr_scheduler_type} takes {', '.join(options) or 'no numbers'}"
        raise InputError(f"--lr_scheduler_kwargs {wrong[0]}: {takes}")
    ranks.check_device(cfg.device)

    idle = {f.name for f in fields(cfg) if "idle" in f.metadata and f.metadata["idle"](cfg)}
    if isinstance(cfg, ReferenceConfig):  # flags of other losses are idle
        idle |= set().union(*map(needs, cfg.losses.values())) - needs(cfg.loss) - {"beta"}
        if unknown := needs(cfg.loss) - INPUTS - vars(cfg).keys():
            name = min(unknown)
            raise InputError(f"--loss_type {cfg.loss_type}: its parameter {name} has no flag yet")
    for name in sorted(given & idle):
        print(f"--{name} has nothing to do in this run")
    if cfg.sharded and not ranks.CAN_SHARD:
        raise InputError("--fsdp: needs torch 2.13 or a newer one")
