"""Load a policy as the flags describe it, and save it.

`load_policy` shows all that happens to a model before it trains, in order: its weights are loaded,
new tokens get embeddings, LoRA is added, dropout and compiling are set.
"""

import os
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from nanoalign import InputError, one_line
from nanoalign.chatml import ChatML
from nanoalign.formats import weights
from nanoalign.formats.files import base_path, from_pretrained, full_name
from nanoalign.formats.peft import (
    LoRAConfig,
    LoRAHead,
    add_adapter,
    ending_in,
    load_adapter,
    read_adapter_config,
    read_tensors,
    save_adapter,
    table_rows,
)
from nanoalign.formats.templates import DATE, KWARGS, TEMPLATES, NativeTemplate
from nanoalign.logps import PackedLM
from nanoalign.lora import table_paths, tied
from nanoalign.model import Policy, fit_embeddings, open_template, vocabulary
from nanoalign.packing import packed
from nanoalign.run import ranks
from nanoalign.run.checkpoint import HEADS, kept_in
from nanoalign.run.device import checkpoint_layers, compile_layers, use_tf32
from nanoalign.run.flags import Config

TRAINED_WITH = "nanoalign_template"  # in tokenizer_config.json: the name of the template


class Base(NamedTuple):
    """What training starts from."""

    name: str  # the base model: a directory, a GGUF file or a name on the hub
    tokenizer: str  # where its tokenizer is: in the adapter's directory, if there is one
    lora: LoRAConfig | None  # the settings of the adapter that training continues


class Reader(NamedTuple):
    """What turns conversations into ids."""

    tokenizer: object
    template: ChatML
    added: list[int]  # ids of the template's markers that the tokenizer lacked


def base_of(cfg: Config) -> Base:
    """Find the base model, its tokenizer and the adapter's settings. An adapter names its base."""
    name, adapter, lora = cfg.model_name_or_path, cfg.adapter_name_or_path, None
    if adapter:
        lora = read_adapter_config(adapter)
        name = name or base_path(lora.base_model_name_or_path, adapter)
    if os.path.exists(Path(name) / "adapter_config.json"):
        raise InputError(f"{name} is an adapter; give it as --adapter_name_or_path")
    has_tokenizer = adapter and (Path(adapter) / "tokenizer_config.json").exists()
    return Base(name, adapter if has_tokenizer else name, lora)


def load_tokenizer(
    name: str, chat_template: str | None = None, trust_remote_code: bool = False,
    chat_template_kwargs: dict | None = None, resumed: dict | None = None,
) -> Reader:  # fmt: skip
    """Load the tokenizer `name` and choose a template. A printed line says which one, and why.

    The template is the first of these: `chat_template`; the one of the `resumed` run; the one that
    training saved with this tokenizer, so that a chat uses what the model was trained with; the
    tokenizer's own, "native"; ChatML.
    """
    tokenizer = from_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)
    saved, native = tokenizer.init_kwargs, tokenizer.chat_template
    saved.pop(DATE, None)  # the date of an earlier run
    saved |= resumed or {}
    kind = chat_template or saved.get(TRAINED_WITH) or ("native" if native else "chatml")
    if kind not in [*TEMPLATES]:
        fault = f"trained with the template {kind!r}, which is not known here"
        raise InputError(f"{name}: {fault}; --chat_template takes {' or '.join(TEMPLATES)}")
    if chat_template:
        why = ""
    elif saved.get(TRAINED_WITH):
        why = " (it was trained with that)"
    elif native:
        why = " (the tokenizer's own; --chat_template chatml writes ChatML instead)"
    else:
        why = " (the tokenizer has none of its own)"
    print(f"template: {kind}{why}")
    saved[TRAINED_WITH] = kind
    if kind != "native":
        saved.pop(KWARGS, None)
        if chat_template_kwargs:
            print("--chat_template_kwargs has nothing to do in this run")
    elif chat_template_kwargs:
        saved[KWARGS] = chat_template_kwargs
    if kind == "native" and "strftime_now" in str(native):
        saved.setdefault(DATE, str(date.today()))
    template, added = open_template(tokenizer, TEMPLATES[kind])
    if isinstance(template, NativeTemplate) and template.opening.strip():
        print(f"the template itself begins a reply with {template.opening!r}; this trains too")
    return Reader(tokenizer, template, added)


def reader_of(cfg: Config, base: Base) -> Reader:
    """The tokenizer and the template of a run."""
    name, tokenizer, lora = base
    if lora and name not in (cfg.model_name_or_path, lora.base_model_name_or_path):
        print(one_line(f"{lora.base_model_name_or_path} is gone; the base is read from {name}"))
    # A resumed run keeps its first date: a template that prints today's would change the data.
    resumed = kept_in(cfg, "tokenizer_config.json")
    resumed = {key: resumed[key] for key in (TRAINED_WITH, KWARGS, DATE) if key in resumed}
    flags = cfg.chat_template, cfg.trust_remote_code, cfg.chat_template_kwargs
    reader = load_tokenizer(tokenizer, *flags, resumed)
    reader.template.train_on_thoughts = cfg.train_on_thoughts
    return reader


def make_room(model: nn.Module, tokenizer, lora: LoRAConfig, adapter: str) -> None:
    """Resize the embeddings to what an adapter brings: a table of another size, or vectors for new
    tokens. load_adapter fills them."""
    path, table = next(iter(table_paths(model).items()))
    rows = table_rows(model, adapter)
    if rows is None and any(ending_in(name, [path]) for name in lora.trainable_token_indices):
        rows = max(vocabulary(tokenizer), len(table.weight))
    if rows not in (None, len(table.weight)):
        model.resize_token_embeddings(rows, mean_resizing=False)


def token_rows(model: nn.Module, rows: dict, to_save: list[str]) -> dict[str, list[int]]:
    """The rows of new tokens that train by themselves: {table: rows}. `rows` are those of all new
    tokens. A table in `to_save` (--lora_modules_to_save) trains as a whole and needs none. That
    unties it from the other table, which then needs rows too."""
    paths = [*table_paths(model)]
    trained = [path for path in paths if path.endswith(tuple(to_save))]
    if rows and trained and tied(model):
        if trained == paths[1:]:  # PEFT can't open an adapter that has the head alone
            fault = "is tied to the embedding, which has new tokens to learn; name both or neither"
            raise InputError(f"--lora_modules_to_save {' '.join(to_save)}: the output head {fault}")
        rows = dict.fromkeys((path.rpartition(".")[2] for path in paths), *rows.values())
    return {name: ids for name, ids in rows.items() if not ending_in(name, trained)}


def load_base(cfg: Config, name: str, train_all: bool = False) -> PackedLM:
    """Load the weights of the model `name`, in 4 bits if the flags say so."""
    adapter = cfg.load_in_4bit and cfg.adapter_name_or_path
    return weights.load_lm(
        name,
        dtype=cfg.computing_dtype,
        device="cpu" if cfg.sharded else cfg.device,  # `shard` moves the parts to the GPUs
        train_all=train_all,
        trust_remote_code=cfg.trust_remote_code,
        load_in_4bit=cfg.load_in_4bit,
        **weights.format_for(adapter, cfg.bnb_4bit_quant_type, cfg.use_bnb_nested_quant),
    )


def shard_or_compile(cfg: Config, lm: PackedLM) -> None:
    """Cut a loaded model between the ranks, or compile its layers, where the flags say so."""
    if cfg.sharded:
        ranks.shard(lm, weights.pick_device(cfg.device))
    compile_layers(cfg, lm)


def load_policy(
    cfg: Config, base: Base | None = None, reader: Reader | None = None, as_base: bool = False
) -> Policy:
    """The model that the flags describe, on its device. Only what trains requires a gradient.

    Pass base_of(cfg) and reader_of(cfg, base) if you have them, else they are made here. With
    `as_base` the policy still computes what the base model does: there is no new adapter, and the
    weights of an adapter are not loaded. Raises InputError if the model's directory, the adapter
    or the flags are wrong.
    """
    base = base or base_of(cfg)
    tokenizer, template, added = reader or reader_of(cfg, base)
    name, _, lora = base
    adapter = cfg.adapter_name_or_path
    lm = load_base(cfg, name, train_all=not cfg.use_peft)
    model = lm.model
    if lora:
        make_room(model, tokenizer, lora, adapter)
    try:
        rows = fit_embeddings(model, tokenizer, added)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if lora:
        check_rows(lora, rows, adapter)
    elif cfg.use_peft and not as_base:
        lora = adapter_of(cfg, name, token_rows(model, rows, cfg.lora_modules_to_save))
    if lora:
        lora.base_model_name_or_path = full_name(name)
        layers = add_adapter(model, lora)
    if lora and not as_base:
        if adapter:
            load_adapter(model, lora, adapter)
        say_what_trains(model, cfg, lora, len(layers))
    elif not cfg.use_peft:
        model.requires_grad_(True)
        print(f"all {sum(p.numel() for p in model.parameters()):,} weights train")
    configure(model, cfg)
    shard_or_compile(cfg, lm)
    use_tf32(cfg, lm)
    return Policy(lm, tokenizer, template, lora)


def adapter_of(cfg: Config, base: str, token_rows: dict) -> LoRAConfig:
    """The settings of a new adapter, from the flags of the same names, with lora_ before or not."""
    flags, names = vars(cfg), [f.name for f in fields(LoRAConfig)]
    given = {n: flags[flag] for n in names for flag in (n, f"lora_{n}") if flag in flags}
    given |= {"trainable_token_indices": token_rows, "base_model_name_or_path": str(base)}
    if len(targets := given["target_modules"]) == 1:
        given["target_modules"] = targets[0]
    return LoRAConfig(**given)


def check_rows(lora: LoRAConfig, rows: dict[str, list[int]], adapter: str) -> None:
    """InputError if an adapter does not train the `rows` of markers that its tokenizer lacks. These
    rows would be saved nowhere, and the trained adapter could not be opened again."""
    for table, ids in rows.items():
        trained = any(table.endswith(name.rpartition(".")[2]) for name in lora.modules_to_save)
        if not trained and not set(ids).issubset(lora.trainable_token_indices.get(table, ())):
            fault = f"its {table} has no rows for the markers that the tokenizer lacks"
            raise InputError(f"{adapter}: {fault}; --chat_template native needs none")


def say_what_trains(model: nn.Module, cfg: Config, lora: LoRAConfig, layers: int) -> None:
    """Print what of a model with an adapter trains. `layers`: how many layers have LoRA."""
    if adapter := cfg.adapter_name_or_path:
        print(f"training continues the adapter {adapter}")
        if weights.read_note(adapter) and not weights.frozen_layers(model):
            print("it was trained on a 4-bit base; --load_in_4bit would give it the same one")
    if lora.tables:
        print("the adapter has its own embedding or head, which replaces the base model's")
    total = weights.all_weights(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"LoRA r={lora.r} on {layers} layers: {trained:,} trained weights "
        f"({trained / total:.2%}); --use_peft false trains all weights"
    )
    if isinstance(model.get_output_embeddings(), LoRAHead) and lora.lora_dropout:
        if not cfg.disable_dropout:
            print("LoRA on the output head trains without dropout")
    experts = [m for path, m in model.named_modules() if path.endswith(".experts")]
    passed_over = [m for m in experts if not any(p.requires_grad for p in m.parameters())]
    if share := sum(map(weights.all_weights, passed_over)) / total:
        print(
            f"LoRA passes over the experts, {share:.0%} of all weights, and the routers: "
            "in transformers these are not linear layers"
        )


def configure(model: nn.Module, cfg: Config) -> None:
    """Set dropout and gradient checkpointing as the flags say."""
    if cfg.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif "attention_dropout" in vars(module):
                module.attention_dropout = 0.0
    if cfg.gradient_checkpointing:
        checkpoint_layers(model)


def stop_at(model: nn.Module, ids: list[int]) -> None:
    """Make transformers' generate stop at these tokens too. It reads the configs, which have the
    base model's end token only. In config.json some models can have one end token, others a list of
    them."""
    if not ids:
        return
    config, generation = model.config, model.generation_config
    is_list = isinstance(config.eos_token_id, list)
    config.eos_token_id = sorted({*config.eos_token_id, *ids}) if is_list else ids[0]
    if generation is not None:  # None in some models with remote code
        old = generation.eos_token_id
        old = old if isinstance(old, list) else [old]
        generation.eos_token_id = sorted({*old, *ids} - {None})
        try:  # transformers refuses to save a changed config that contradicts itself
            generation.validate(strict=True)
        except ValueError:  # a temperature without do_sample, for instance
            generation.do_sample = True


def save_policy(policy: Policy, directory: str | Path, state_dict: dict | None = None) -> None:
    """Save the adapter or the model, and the tokenizer, as PEFT and transformers read them.
    `state_dict` has the model's weights where this process holds only a part of them
    (ranks.whole_weights). With {} a model is saved without its weights."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if policy.lora is not None:
        save_adapter(policy.model, policy.lora, directory)
        weights.write_note(policy.model, directory)
    else:
        stop_at(policy.model, policy.template.stop_ids)
        policy.model.set_attn_implementation(policy.attention)
        weights_to_save = state_dict if state_dict is None else dict(state_dict)
        policy.model.save_pretrained(directory, state_dict=weights_to_save)  # empties the dict
        policy.model.set_attn_implementation(packed())
    if heads := heads_of(policy):
        save_file({name: t.cpu().contiguous() for name, t in heads.items()}, directory / HEADS)
    policy.tokenizer.save_pretrained(directory)


def heads_of(policy: Policy) -> dict[str, Tensor]:
    """The weights of modules that a script has added to `policy.lm`. The files of an adapter or a
    model do not have them."""
    state = policy.lm.state_dict()
    return {name: t for name, t in state.items() if not name.startswith("model.")}


def load_saved(policy: Policy, directory: Path, trust_remote_code: bool = False) -> None:
    """Load into a policy the weights that save_policy has written."""
    if heads := heads_of(policy):
        saved = read_tensors(directory, HEADS)
        for name, tensor in heads.items():
            tensor.copy_(saved[name])
    if policy.lora is not None:
        return load_adapter(policy.model, policy.lora, directory)
    saved = weights.load_dense(str(directory), torch.float32, trust_remote_code=trust_remote_code)
    for name, parameter in policy.model.named_parameters():
        weight = saved.get_parameter(name).detach()
        parameter.detach().copy_(ranks.part_of(weight, parameter))
