"""Flags and a directory -> a policy; and back to a directory.

`load_policy` reads top to bottom what happens to a model here: its weights, new tokens, what of it
trains, and how it computes.
"""

import os
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
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

    name: str  # the base model's directory, GGUF file or name on the hub
    tokenizer: str  # where it is: the adapter's own, if that brings one
    lora: LoRAConfig | None  # of the adapter that training goes on from


class Reader(NamedTuple):
    """What turns conversations into ids."""

    tokenizer: object
    template: ChatML
    added: list[int]  # ids of the template's markers that the tokenizer lacked


def base_of(cfg: Config) -> Base:
    name, adapter, lora = cfg.model_name_or_path, cfg.adapter_name_or_path, None
    if adapter:
        lora = read_adapter_config(adapter)
        name = name or base_path(lora.base_model_name_or_path, adapter)
    if os.path.exists(Path(name) / "adapter_config.json"):
        raise InputError(f"{name} is an adapter; give it as --adapter_name_or_path")
    own = adapter and (Path(adapter) / "tokenizer_config.json").exists()
    return Base(name, adapter if own else name, lora)


def load_tokenizer(
    name: str, chat_template: str | None = None, trust_remote_code: bool = False,
    chat_template_kwargs: dict | None = None, resumed: dict | None = None,
) -> Reader:  # fmt: skip
    """The reader of the tokenizer `name`; a printed line tells the template.

    The template's name and what it is given are saved with the tokenizer. Without a `chat_template`
    they are taken from there, or from what a `resumed` run saved, so that a chat or the next stage
    reads what training wrote; where nothing is, it is the tokenizer's own, or else ChatML.
    """
    tokenizer = from_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)
    saved, own = tokenizer.init_kwargs, tokenizer.chat_template
    saved.pop(DATE, None)  # of the run that made it
    saved |= resumed or {}
    kind = chat_template or saved.get(TRAINED_WITH) or ("native" if own else "chatml")
    if kind not in [*TEMPLATES]:
        fault = f"trained with the template {kind!r}, which is not known here"
        raise InputError(f"{name}: {fault}; --chat_template takes {' or '.join(TEMPLATES)}")
    why = " (the tokenizer has none of its own)"
    if chat_template:
        why = ""
    elif saved.get(TRAINED_WITH):
        why = " (it was trained with that)"
    elif own:
        why = " (the tokenizer's own; --chat_template chatml writes ChatML instead)"
    print(f"template: {kind}{why}")
    saved[TRAINED_WITH] = kind
    if kind != "native":
        saved.pop(KWARGS, None)
        if chat_template_kwargs:
            print("--chat_template_kwargs has nothing to do in this run")
    elif chat_template_kwargs:
        saved[KWARGS] = chat_template_kwargs
    if kind == "native" and "strftime_now" in str(own):
        saved.setdefault(DATE, str(date.today()))
    template, added = open_template(tokenizer, TEMPLATES[kind])
    if isinstance(template, NativeTemplate) and template.opening.strip():
        print(f"the template itself begins a reply with {template.opening!r}, which trains too")
    return Reader(tokenizer, template, added)


def reader_of(cfg: Config, base: Base) -> Reader:
    """What the run that the flags describe reads conversations with."""
    name, tokenizer, lora = base
    if lora and name not in (cfg.model_name_or_path, lora.base_model_name_or_path):
        print(one_line(f"{lora.base_model_name_or_path} is gone; the base is read from {name}"))
    # What a checkpoint says of its template: with another date in it the data would be others.
    resumed = kept_in(cfg, "tokenizer_config.json")
    resumed = {key: resumed[key] for key in (TRAINED_WITH, KWARGS, DATE) if key in resumed}
    chosen = cfg.chat_template, cfg.trust_remote_code, cfg.chat_template_kwargs
    reader = load_tokenizer(tokenizer, *chosen, resumed)
    reader.template.train_on_thoughts = cfg.train_on_thoughts
    return reader


def make_room(model: nn.Module, tokenizer, lora: LoRAConfig, adapter: str) -> None:
    """As many rows as an adapter's own embedding or head has, or its rows for new tokens need; the
    adapter fills them."""
    path, table = next(iter(table_paths(model).items()))
    rows = table_rows(model, adapter)
    if rows is None and any(ending_in(name, [path]) for name in lora.trainable_token_indices):
        rows = max(vocabulary(tokenizer), len(table.weight))
    if rows not in (None, len(table.weight)):
        model.resize_token_embeddings(rows, mean_resizing=False)


def token_rows(model: nn.Module, rows: dict, whole: list[str]) -> dict[str, list[int]]:
    """The `rows` of new tokens, {table: rows}, that train on their own: not those of a table that
    trains whole. Tied tables part when one of them does, and then the other has rows too."""
    paths = [*table_paths(model)]
    trained = [path for path in paths if path.endswith(tuple(whole))]
    if rows and trained and tied(model):
        # the head alone: PEFT can't open such an adapter
        if trained == paths[1:]:
            fault = "is tied to the embedding, which has new tokens to learn; name both or neither"
            raise InputError(f"--lora_modules_to_save {' '.join(whole)}: the output head {fault}")
        rows = dict.fromkeys((path.rpartition(".")[2] for path in paths), *rows.values())
    return {name: ids for name, ids in rows.items() if not ending_in(name, trained)}


def load_base(cfg: Config, name: str, train_all: bool = False) -> PackedLM:
    adapter = cfg.load_in_4bit and cfg.adapter_name_or_path
    return weights.load_lm(
        name,
        dtype=cfg.computing_dtype,
        device="cpu" if cfg.sharded else cfg.device,  # whole; `shard` moves it in parts
        train_all=train_all,
        trust_remote_code=cfg.trust_remote_code,
        load_in_4bit=cfg.load_in_4bit,
        **weights.format_for(adapter, cfg.bnb_4bit_quant_type, cfg.use_bnb_nested_quant),
    )


def place(cfg: Config, lm: PackedLM) -> None:
    """Cut a loaded model between the ranks, or compile its layers."""
    if cfg.sharded:
        ranks.shard(lm, weights.pick_device(cfg.device))
    compile_layers(cfg, lm)


def load_policy(
    cfg: Config, base: Base | None = None, reader: Reader | None = None, as_base: bool = False
) -> Policy:
    """The model that the flags describe, on its device, with everything frozen but what trains.

    `base` is base_of(cfg) and `reader` is reader_of(cfg, base), where the data was read first.
    `as_base`: no new adapter is made, and one that is there is not filled yet, so that `reference`
    is the base model. Raises InputError for whatever is wrong with the directory, the adapter or
    the flags.
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
    place(cfg, lm)
    use_tf32(cfg, lm)
    return Policy(lm, tokenizer, template, lora)


def adapter_of(cfg: Config, base: str, token_rows: dict) -> LoRAConfig:
    """A new adapter's settings."""
    targets = cfg.lora_target_modules
    return LoRAConfig(
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=targets[0] if len(targets) == 1 else targets,
        use_rslora=cfg.use_rslora,
        bias=cfg.lora_bias,
        modules_to_save=cfg.lora_modules_to_save,
        trainable_token_indices=token_rows,
        base_model_name_or_path=str(base),
    )


def check_rows(lora: LoRAConfig, rows: dict[str, list[int]], adapter: str) -> None:
    """Has an adapter the `rows` of the markers that its tokenizer lacks? They would be in no file,
    and what is trained could not be opened again."""
    for table, ids in rows.items():
        whole = any(table.endswith(name.rpartition(".")[2]) for name in lora.modules_to_save)
        if not whole and not set(ids).issubset(lora.trainable_token_indices.get(table, ())):
            fault = f"its {table} has no rows for the markers that the tokenizer lacks"
            raise InputError(f"{adapter}: {fault}; --chat_template native needs none")


def say_what_trains(model: nn.Module, cfg: Config, lora: LoRAConfig, layers: int) -> None:
    """Of a model with an adapter, in lines."""
    if adapter := cfg.adapter_name_or_path:
        print(f"goes on from the adapter {adapter}")
        if weights.read_note(adapter) and not weights.frozen_layers(model):
            print("it was trained on a 4-bit base; --load_in_4bit would give it the same one")
    if lora.tables:
        print("the adapter has a whole embedding or head, which takes the place of the base's")
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
            f"LoRA passes over its experts, {share:.0%} of all weights, and over its routers: "
            "in transformers they are no linear layers"
        )


def configure(model: nn.Module, cfg: Config) -> None:
    """Dropout and checkpointing, as the flags have them."""
    if cfg.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif "attention_dropout" in vars(module):
                module.attention_dropout = 0.0
    if cfg.gradient_checkpointing:
        checkpoint_layers(model)


def stop_at(model: nn.Module, ids: list[int]) -> None:
    """Let transformers' own generate end a text at these tokens too: it goes by the configs, which
    know only the end that the base model had. In some models' config.json there is room for one."""
    if not ids:
        return
    config, generation = model.config, model.generation_config
    several = isinstance(config.eos_token_id, list)
    config.eos_token_id = sorted({*config.eos_token_id, *ids}) if several else ids[0]
    if generation is not None:  # a model with code of its own may have none
        old = generation.eos_token_id
        old = old if isinstance(old, list) else [old]
        generation.eos_token_id = sorted({*old, *ids} - {None})
        try:  # transformers saves what was changed only if it is right in itself
            generation.validate(strict=True)
        except ValueError:  # a temperature, say, and nothing that says to sample
            generation.do_sample = True


def save_policy(policy: Policy, directory: str | Path, state_dict: dict | None = None) -> None:
    """Save the adapter or the model, and the tokenizer, as PEFT and transformers read them.

    `state_dict` has the model's weights where this process holds only a part of them
    (ranks.whole_weights). With {} a model is saved without its weights.
    """
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
    """What a script has added to `policy.lm`: no adapter and no model of transformers holds it."""
    state = policy.lm.state_dict()
    return {name: t for name, t in state.items() if not name.startswith("model.")}


def load_saved(policy: Policy, directory: Path, trust_remote_code: bool = False) -> None:
    """Give a policy the weights that save_policy wrote of it."""
    for name, tensor in heads_of(policy).items():
        tensor.copy_(load_file(directory / HEADS)[name])
    if policy.lora is not None:
        return load_adapter(policy.model, policy.lora, directory)
    saved = weights.load_dense(str(directory), torch.float32, trust_remote_code=trust_remote_code)
    for name, parameter in policy.model.named_parameters():
        whole = saved.get_parameter(name).detach()
        parameter.detach().copy_(ranks.part_of(whole, parameter))
