"""Can a kind of model be trained here? Found out by a run, before any weight is read.

Most decoders of transformers send their attention through its AttentionInterface and have a head
that is one product. Some ignore the interface without a word, or do more than a product; packed
rows would give wrong log-probs there, and nobody would notice.
"""

import copy

import torch
from transformers import AutoModelForCausalLM

from nanoalign import InputError
from nanoalign.formats.experts import unstack
from nanoalign.logps import PackedLM
from nanoalign.packing import Example, packed_attention


def probe(
    config, name: str, trust_remote_code: bool = False, unstacked: bool = False
) -> tuple[float, float | None]:
    """-> what the head does beyond a product, (scale, softcap), or InputError.

    Two examples in one row, one with two branches, must give the log-probs of transformers' own
    forward pass, sequence by sequence, in fp32, on a miniature of the model with random weights.
    `unstacked`: with its experts as linear layers.
    """
    from transformers import AttentionInterface  # late, as in packing.packed

    ids, calls = list(range(1, 24)), []
    examples = [
        Example(ids[:6], [(ids[6:13], [True] * 7), (ids[13:18], [True] * 5)]),
        Example(ids[3:7], [(ids[9:20], [True] * 11)]),
    ]

    def counted(*args, **kwargs):
        calls.append(1)
        return packed_attention(*args, **kwargs)

    try:
        if config.get_text_config() is not config:  # Gemma 3 with its eyes, and the like
            raise ValueError("it is more than its text model; expected that one by itself")
        small = miniature(config)
        # The CPU's generator alone: asked for all of them, torch starts every GPU of the machine.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            more = {"attn_implementation": "eager", "trust_remote_code": trust_remote_code}
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, **more).eval()
            scale, softcap = head_of(model, torch.tensor([ids]))
            expected = [plain_logps(model, e.prompt, c) for e in examples for c, _ in e.completions]
            if unstacked:
                unstack(model)
            AttentionInterface.register("packed_probe", counted)
            model.set_attn_implementation("packed_probe")
            got = PackedLM(model, scale, softcap, None)(examples).logps.tolist()
        if len(calls) != small.num_hidden_layers:
            raise ValueError("it does not use transformers' AttentionInterface")
        if any(abs(a - b) > 1e-4 * max(1.0, abs(b)) for a, b in zip(got, expected)):
            raise ValueError("it computes something that packing does not know")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fault = f"{name}: {config.model_type} can't be trained here: {reason}"
        raise InputError(fault) from None
    return scale, softcap


def miniature(config):
    """A copy of the config with two layers (one of each kind), a small vocabulary and window, and
    few small experts."""
    config = copy.deepcopy(config)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    layers = max(2, len(kinds))
    small = {"num_hidden_layers": layers, "layer_types": (kinds * 2)[:layers]}
    small |= dict.fromkeys(("sliding_window", "attention_chunk_size"), 4)
    sizes = "vocab_size", "intermediate_size", "moe_intermediate_size"
    small |= dict.fromkeys((*sizes, "shared_expert_intermediate_size"), 64)
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        small[key] = min(32, getattr(config, key, None) or 0)  # enough for the 8 or so of a token
    small |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), None)
    for key, value in small.items():
        if getattr(config, key, None) is not None:
            setattr(config, key, value)
    return config


def head_of(model, row) -> tuple[float, float | None]:
    """What the model does with the product of hidden states and head: (scale, softcap)."""
    softcap = model.config.to_dict().get("final_logit_softcapping")
    z = model.get_output_embeddings()(model.get_decoder()(row).last_hidden_state)
    ratio = float((model(row).logits * z).sum() / (z * z).sum())
    return (1.0 if softcap or abs(ratio - 1) < 1e-5 else ratio), softcap


def plain_logps(model, prompt: list[int], completion: list[int]) -> float:
    """log pi(completion | prompt) from all the logits of one sequence."""
    ids = torch.tensor([prompt + completion])
    logps = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)  # (n, V)
    return logps.gather(1, ids[0, len(prompt) :, None]).sum().item()
