"""Can a kind of model be trained here? Found out by a run, before any weight is read.

Most decoders of transformers send their attention through its AttentionInterface and have a head
that is one product. Some ignore the interface without a word, or do more than a product; packed
rows would give wrong log-probs there, and nobody would notice.
"""

import copy

import torch
from transformers import AutoModelForCausalLM

from nanoalign import InputError
from nanoalign.logps import PackedLM
from nanoalign.packing import Example, packed_attention


def probe(config, name: str, trust_remote_code: bool = False) -> tuple[float, float | None]:
    """Can this kind of model be trained here? -> its head's (scale, softcap).

    Two examples in one row, one with two branches, must give the log-probs of transformers' own
    forward pass, sequence by sequence, in fp32, on a copy of the config with two layers (one of
    each kind), a small vocabulary, a short window and random weights. Raises InputError if not.
    """
    from transformers import AttentionInterface  # late, as in packing.packed

    config = copy.deepcopy(config)
    kinds = list(dict.fromkeys(config.layer_types)) if hasattr(config, "layer_types") else []
    small = {
        "num_hidden_layers": max(2, len(kinds)),
        "layer_types": (kinds * 2)[: max(2, len(kinds))],
        "vocab_size": 64,
        "sliding_window": 4,
        "attention_chunk_size": 4,
        "intermediate_size": 64,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    for key, value in small.items():
        if getattr(config, key, None) is not None:
            setattr(config, key, value)
    ids = list(range(1, 24))
    examples = [
        Example(ids[:6], [(ids[6:13], [True] * 7), (ids[13:18], [True] * 5)]),
        Example(ids[3:7], [(ids[9:20], [True] * 11)]),
    ]
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=trust_remote_code,
            ).eval()
            row = torch.tensor([ids])
            softcap = config.to_dict().get("final_logit_softcapping")
            z = model.get_output_embeddings()(model.get_decoder()(row).last_hidden_state)
            ratio = float((model(row).logits * z).sum() / (z * z).sum())
            scale = 1.0 if softcap or abs(ratio - 1) < 1e-5 else ratio
            expected = [
                _plain_logps(model, e.prompt, completion)
                for e in examples
                for completion, _ in e.completions
            ]
            calls = []

            def counted(*args, **kwargs):
                calls.append(1)
                return packed_attention(*args, **kwargs)

            AttentionInterface.register("packed_probe", counted)
            model.set_attn_implementation("packed_probe")
            got = PackedLM(model, scale, softcap, None)(examples).logps.tolist()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name}: {config.model_type} can't be trained here: {reason}") from None
    if len(calls) != config.num_hidden_layers:
        raise InputError(
            f"{name}: {config.model_type} does not use transformers' AttentionInterface"
        )
    if any(abs(a - b) > 1e-4 * max(1.0, abs(b)) for a, b in zip(got, expected)):
        raise InputError(
            f"{name}: {config.model_type} computes something that packing does not know"
        )
    return scale, softcap


def _plain_logps(model, prompt: list[int], completion: list[int]) -> float:
    """log pi(completion | prompt) as everybody computes it: all the logits of one sequence."""
    ids = torch.tensor([prompt + completion])
    logps = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)  # (n, V)
    return logps.gather(1, ids[0, len(prompt) :, None]).sum().item()
