"""A directory -> a model ready to train; and back to a directory.

`load_policy` reads top to bottom what happens to a model here: tokenizer and markers, weights, the
probe (probe.py), LoRA. The model itself stays transformers'; only its attention runs through
packing.packed_attention, which transformers' AttentionInterface allows, and its head is not called
(logps.py).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanoalign import InputError
from nanoalign.chatml import ChatML
from nanoalign.formats.files import from_pretrained
from nanoalign.formats.peft import add_adapter, load_adapter, read_adapter_config, save_adapter
from nanoalign.formats.templates import TEMPLATES, NativeTemplate
from nanoalign.formats.weights import format_for, frozen_weights, load_lm, read_note, write_note
from nanoalign.logps import PackedLM, Scores
from nanoalign.lora import LoRAConfig, Reference
from nanoalign.packing import Example, packed
from nanoalign.run.flags import Config


@dataclass
class Policy:
    """What is trained, and what belongs to it."""

    lm: PackedLM  # examples -> scores
    tokenizer: PreTrainedTokenizerBase
    template: ChatML | NativeTemplate
    lora: LoRAConfig | None  # None: all weights train
    attention: str  # transformers' implementation that generation runs under
    start: Reference | None = None  # the policy as it was at the start; None: all weights train

    @property
    def model(self) -> nn.Module:
        return self.lm.model

    def __call__(self, examples: list[Example], neftune_alpha: float = 0.0) -> Scores:
        return self.lm(examples, neftune_alpha)


def base_of(cfg: Config) -> tuple[str, LoRAConfig | None]:
    """The base model's name, and the settings of the adapter that training goes on from."""
    name, adapter, lora = cfg.model_name_or_path, cfg.adapter_name_or_path, None
    if adapter:
        lora = read_adapter_config(adapter)
        name = name or lora.base_model_name_or_path
        if not name:
            raise InputError(f"{adapter}: names no base model; give --model_name_or_path")
    if (Path(name) / "adapter_config.json").exists():
        raise InputError(f"{name} is an adapter; give it as --adapter_name_or_path")
    return name, lora


def tokenizer_of(cfg: Config) -> tuple[PreTrainedTokenizerBase, ChatML | NativeTemplate, list[int]]:
    """As load_tokenizer: the adapter's own tokenizer where it brings one, else the base model's."""
    adapter = cfg.adapter_name_or_path
    enlarged = adapter and (Path(adapter) / "tokenizer_config.json").exists()
    name = adapter if enlarged else base_of(cfg)[0]
    return load_tokenizer(name, cfg.chat_template, cfg.trust_remote_code)


def load_policy(cfg: Config, opened: tuple | None = None) -> Policy:
    """The model that the flags describe, on its device, with everything frozen but what trains.

    `opened` is tokenizer_of(cfg), where the data was read first. Raises InputError for whatever is
    wrong with the directory, the adapter or the flags.
    """
    (name, lora), adapter = base_of(cfg), cfg.adapter_name_or_path
    tokenizer, template, added = opened or tokenizer_of(cfg)
    lm = load_lm(
        name,
        dtype=cfg.dtype,
        device=cfg.device,
        train_all=not cfg.use_peft,
        trust_remote_code=cfg.trust_remote_code,
        load_in_4bit=cfg.load_in_4bit,
        **format_for(
            cfg.load_in_4bit and adapter, cfg.bnb_4bit_quant_type, cfg.use_bnb_nested_quant
        ),
    )
    model = lm.model
    attention = model.config._attn_implementation
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = max(tokenizer.get_vocab().values()) + 1  # some skip ids: more than len(tokenizer)
    if lora and lora.trainable_token_indices and tokens > rows:  # the adapter fills them
        model.resize_token_embeddings(tokens, mean_resizing=False)
    new = _fit_embeddings(model, tokens, added, name)

    if not cfg.use_peft:
        model.requires_grad_(True)
        print(f"all {sum(p.numel() for p in model.parameters()):,} weights train")
    else:
        lora = lora or LoRAConfig(
            r=cfg.lora_r,
            lora_alpha=cfg.lora_alpha,
            lora_dropout=cfg.lora_dropout,
            target_modules=_one(cfg.lora_target_modules),
            use_rslora=cfg.use_rslora,
            bias=cfg.lora_bias,
            modules_to_save=cfg.lora_modules_to_save,
            trainable_token_indices=new,
            base_model_name_or_path=str(name),
        )
        layers = add_adapter(model, lora)
        if not any(p.requires_grad for p in model.parameters()):
            raise InputError(f"{name}: has nothing that trains")
        if adapter:
            load_adapter(model, adapter)
            print(f"goes on from the adapter {adapter}")
            if read_note(adapter) and not frozen_weights(model):
                print("it was trained on a 4-bit base; --load_in_4bit would give it the same one")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters()) + frozen_weights(model)
        print(
            f"LoRA r={lora.r} on {len(layers)} layers: {trained:,} trained weights "
            f"({trained / total:.2%}); "
            "--use_peft false trains all weights"
        )
    if cfg.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif "attention_dropout" in vars(module):
                module.attention_dropout = 0.0
    if cfg.gradient_checkpointing:
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if cfg.torch_compile:
        # policy and reference are compiled apart: only with eager's rounding do they start equal
        exact = {"emulate_precision_casts": True}
        for layer in model.get_decoder().layers:
            layer.compile(dynamic=True, options=exact)
    model.set_attn_implementation(packed())
    return Policy(lm, tokenizer, template, lora, attention, Reference(lm) if lora else None)


def load_tokenizer(name: str, chat_template: str, trust_remote_code: bool = False):
    """-> (tokenizer, template, ids of the template's markers that had to be added)."""
    tokenizer = from_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)
    kind = TEMPLATES[chat_template]
    missing = [marker for marker in kind.markers if marker not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    if kind.jinja:  # what other tools see: the template, and that its last marker ends a text
        tokenizer.chat_template, tokenizer.eos_token = kind.jinja, kind.markers[-1]
    template = kind(tokenizer)
    if tokenizer.pad_token_id is None:  # generation pads; training never does
        (stop, *_) = tokenizer.convert_ids_to_tokens(template.stop_ids)
        tokenizer.pad_token = tokenizer.eos_token or stop
    return tokenizer, template, tokenizer.convert_tokens_to_ids(missing)


def _one(values: list[str]) -> list[str] | str:
    return values[0] if len(values) == 1 else values


def _fit_embeddings(model, tokens: int, added: list[int], name: str) -> dict[str, list[int]]:
    """Rows for added tokens, each the mean of the old ones. -> PEFT's trainable_token_indices."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = embedding.weight.shape[0]
    if tokens > rows and tokens - len(added) > rows:
        raise InputError(f"{name}: the tokenizer has {tokens} ids, the embeddings {rows} rows")
    if not added:
        return {}
    untied = head.weight is not embedding.weight
    tables = [embedding, head] if untied else [embedding]
    means = [table.weight.detach().float().mean(0) for table in tables]
    if tokens > rows:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding, head] if untied else [embedding]
    paths = {id(module): path for path, module in model.named_modules()}
    with torch.no_grad():
        for table, mean in zip(tables, means):
            table.weight[added] = mean.to(table.weight.dtype)
    return {paths[id(table)].rpartition(".")[2]: added for table in tables}


def save_policy(policy: Policy, directory: str | Path) -> None:
    """The adapter, or the whole model, and the tokenizer, as PEFT and transformers read them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if policy.lora is not None:
        save_adapter(policy.model, policy.lora, directory)
        write_note(policy.model, directory)
    else:
        policy.model.set_attn_implementation(policy.attention)
        policy.model.save_pretrained(directory)
        policy.model.set_attn_implementation(packed())
    policy.tokenizer.save_pretrained(directory)
