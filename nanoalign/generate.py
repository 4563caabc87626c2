"""Text out of a policy: transformers' generate, under the attention that the model came with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

from nanoalign.chatml import Message, encode
from nanoalign.model import Policy
from nanoalign.packing import packed


def generate(policy: Policy, conversations: list[list[Message]], **how) -> list[str]:
    """One reply to each conversation; `how` are the arguments of `reply_to`."""
    pieces = [list(policy.template.prompt(messages)) for messages in conversations]
    prompts = [ids for ids, _ in encode(policy.tokenizer, pieces)]
    return reply_to(policy, prompts, **how)


@torch.no_grad()
def reply_to(
    policy: Policy,
    prompts: list[list[int]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """One reply to each prompt in ids, which ends in a reply's header: transformers' generate.

    Temperature 0 is greedy; otherwise tokens are sampled, from the likeliest that together have
    probability `top_p`. A `streamer` gets the tokens of a single reply while they are made.
    """
    longest, pad = max(map(len, prompts)), policy.tokenizer.pad_token_id
    rows = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=policy.lm.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    with generation(policy) as model:
        out = model.generate(
            rows,
            attention_mask=mask.to(rows.device),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            eos_token_id=policy.template.stop_ids,
            pad_token_id=pad,
            streamer=streamer,
            **sampling,
        )
    return policy.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)


@contextmanager
def generation(policy: Policy) -> Iterator[nn.Module]:
    """The model in eval mode under the attention it was loaded with, which has a KV cache."""
    training = policy.model.training
    policy.model.eval().set_attn_implementation(policy.attention)
    try:
        yield policy.model
    finally:
        policy.model.train(training).set_attn_implementation(packed())
