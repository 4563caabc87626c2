"""A model of transformers -> a policy that can train and generate.

The code is transformers'. Only attention is ours: packing.packed_attention, through transformers'
AttentionInterface. If the tokenizer lacks markers of the chat template, it gets them, and the
embeddings get a vector for each. Some models do more than packed rows or a Head can express:
`probe` finds out.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoalign import InputError
from nanoalign.chatml import ChatML, Message, encode
from nanoalign.fast.compiled import uncompiled  # compiled layers can't generate quickly
from nanoalign.fast.miniature import miniature_model  # two layers of the same kind
from nanoalign.logps import PackedLM, Scores
from nanoalign.lora import Reference, add_lora, add_token_rows, table_paths, tied
from nanoalign.packing import Example, packed


@dataclass
class Policy:
    lm: PackedLM  # examples -> scores
    tokenizer: object
    template: ChatML  # or another class with the same members
    lora: object = None  # the settings of its adapter (formats/peft.py)
    attention: str = field(init=False)  # transformers' name of the attention for generation
    reference: Reference | None = field(init=False)  # the policy at the start; None: all trains

    def __post_init__(self):
        self.attention = self.model.config._attn_implementation  # there is no public name for it
        self.model.set_attn_implementation(packed())
        frozen = not all(p.requires_grad for p in self.model.parameters())
        self.reference = Reference(self.lm) if frozen else None

    @property
    def model(self) -> nn.Module:
        return self.lm.model

    def __call__(self, examples: list[Example], neftune_alpha: float = 0.0) -> Scores:
        return self.lm(examples, neftune_alpha)


def make_policy(model: nn.Module, tokenizer, r=None, alpha=16, template=ChatML) -> Policy:
    """Put LoRA of rank r on a model's linear layers. r=None: all weights train. They become fp32,
    and products keep the model's dtype. The tokenizer gets the template's markers."""
    scale, softcap = probe(type(model), model.config, model.name_or_path or "the model")
    template, added = open_template(tokenizer, template)
    rows, autocast = fit_embeddings(model, tokenizer, added), None
    if r is None:
        autocast = None if model.dtype == torch.float32 else model.dtype
        model.float().requires_grad_(True)
    else:
        add_lora(model, r, alpha / r)
        add_token_rows(model, rows)
    return Policy(PackedLM(model, scale, softcap, autocast), tokenizer, template)


def probe(
    build: Callable, config, name: str, convert: Callable | None = None
) -> tuple[float, float | None]:
    """-> (scale, softcap) of the Head of a kind of model. InputError: it can't be trained here.
    Some models ignore AttentionInterface, or their head does more. Their log-probs would be wrong
    without a sign. So a small model, build(config), computes two examples in one row. Its log-probs
    must be those of transformers' forward, text by text. `convert` changes it in between."""
    ids = list(range(1, 24))
    examples = [
        Example(ids[:6], [(ids[6:13], [True] * 7), (ids[13:18], [True] * 5)]),
        Example(ids[3:7], [(ids[9:20], [True] * 11)]),
    ]

    def alone(prompt: list[int], reply: list[int]) -> Tensor:  # log pi(reply | prompt)
        text, n = torch.tensor([prompt + reply]), len(prompt)
        return -F.cross_entropy(model(text).logits[0, n - 1 : -1], text[0, n:], reduction="sum")

    try:
        with torch.no_grad():
            model = miniature_model(build, config)
            model.set_attn_implementation("eager")
            hidden = model.get_decoder()(torch.tensor([ids])).last_hidden_state
            z, logits = model.get_output_embeddings()(hidden), model(torch.tensor([ids])).logits
            softcap = config.to_dict().get("final_logit_softcapping")
            ratio = float((logits * z).sum() / (z * z).sum())
            scale = 1.0 if softcap or abs(ratio - 1) < 1e-5 else ratio
            expected = [alone(e.prompt, ids) for e in examples for ids, _ in e.texts]
            if convert:
                convert(model)
            model.set_attn_implementation(packed())
            got = PackedLM(model, scale, softcap)(examples).logps
        if not torch.allclose(got, torch.stack(expected), rtol=1e-5, atol=1e-5):
            raise InputError("its log-probs change if texts share a row")
    except Exception as error:
        why = str(error) or type(error).__name__
        if not isinstance(error, InputError):
            why = f"it does not run on a packed row ({why.splitlines()[0]})"
        fault = f"{name}: {config.model_type} can't be trained here: {why}"
        raise InputError(f"{fault}; docs/families.md lists models that can") from None
    return scale, softcap


def open_template(tokenizer, kind: type) -> tuple[ChatML, list[int]]:
    """Add the template's missing markers to the tokenizer -> the template, the new ids."""
    missing = [marker for marker in kind.markers if marker not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    if kind.jinja:  # other programs read these two from the saved tokenizer
        tokenizer.chat_template, tokenizer.eos_token = kind.jinja, kind.markers[-1]
    template = kind(tokenizer)
    if tokenizer.pad_token_id is None:  # generation pads; training never does
        any_id = [*template.stop_ids, 0][0]
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(any_id)
    return template, tokenizer.convert_tokens_to_ids(missing)


def vocabulary(tokenizer) -> int:
    """How many vectors an embedding needs. A tokenizer that skips ids needs more than its len."""
    return max(tokenizer.get_vocab().values()) + 1


def fit_embeddings(model: nn.Module, tokenizer, added: list[int]) -> dict[str, list[int]]:
    """Give each added token the mean vector in embedding and head. -> the argument `indices` of
    lora.add_token_rows. InputError: the tokenizer has more ids than the embedding has vectors."""
    tokens, rows = vocabulary(tokenizer), len(model.get_input_embeddings().weight)
    if tokens - len(added) > rows:
        raise InputError(f"the tokenizer has {tokens} ids, the embeddings {rows} rows")
    if not added:
        return {}

    paths = [*table_paths(model)][: 1 if tied(model) else 2]
    means = [model.get_submodule(path).weight.detach().float().mean(0) for path in paths]
    if tokens > rows:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    for path, mean in zip(paths, means):
        weight = model.get_submodule(path).weight
        weight.data[added] = mean.to(weight.dtype)
    return {path.rpartition(".")[2]: added for path in paths}


def generate(policy: Policy, conversations: list[list[Message]], **options) -> list[str]:
    """One reply to each conversation. The options are those of `sample`."""
    if not conversations:
        return []
    pieces = [list(policy.template.prompt(messages)) for messages in conversations]
    replies = sample(policy, [ids for ids, _ in encode(policy.tokenizer, pieces)], **options)
    return policy.tokenizer.batch_decode(replies, skip_special_tokens=True)


@torch.no_grad()
def sample(
    policy: Policy, prompts: list[list[int]], max_new_tokens: int = 256,
    temperature: float = 0.0, top_p: float = 1.0, streamer=None,
) -> list[list[int]]:  # fmt: skip
    """The ids of one reply to each prompt, up to the one that ends it: transformers' generate,
    without the model's own generation_config. Temperature 0 is greedy; otherwise tokens are sampled
    from the likeliest of together probability `top_p`. A `streamer` gets a single reply's ids."""
    from transformers import GenerationConfig  # late, as in packing.packed

    longest, pad = max(map(len, prompts)), policy.tokenizer.pad_token_id
    config = policy.model.config
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    learned = not getattr(config, "rope_parameters", None)  # rotary positions have no end
    if learned and longest + max_new_tokens - 1 > limit:
        texts = f"a prompt of {longest} tokens and {max_new_tokens} new ones"
        raise InputError(f"{texts}: the model has {limit} learned positions")
    rows = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=policy.lm.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    stops = policy.template.stop_ids
    asked = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad)
    if temperature > 0:
        asked.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    with generation(policy) as model, uncompiled(model):
        model.generation_config = GenerationConfig()  # or transformers completes `asked` from it
        mask = mask.to(rows.device)
        out = model.generate(rows, asked, attention_mask=mask, streamer=streamer)
    replies = out[:, longest:].tolist()
    ends = [[i + 1 for i, token in enumerate(ids) if token in stops] for ids in replies]
    return [ids[: end[0]] if end else ids for ids, end in zip(replies, ends)]


@contextmanager
def generation(policy: Policy) -> Iterator[nn.Module]:
    """The model in eval mode, under the attention it was loaded with, which has a KV cache. Its
    generation_config is restored afterwards."""
    model, training, config = policy.model, policy.model.training, policy.model.generation_config
    model.eval().set_attn_implementation(policy.attention)
    try:
        yield model
    finally:
        model.train(training).set_attn_implementation(packed())
        model.generation_config = config
