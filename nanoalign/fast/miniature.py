"""A helper of model.probe: a small model of the same kind, so that the probe takes seconds.

What the probe finds does not depend on the numbers of layers, tokens or experts. The sizes of the
hidden states and of heads stay, since in many configs one is computed from the others.
"""

import copy

import torch

from nanoalign import InputError

SMALL = {  # {new value: settings of a config}
    4: ("sliding_window", "attention_chunk_size", "index_topk"),  # so that 20 tokens exceed them
    64: (
        "vocab_size",
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    ),
    32: ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    0: ("pad_token_id", "bos_token_id", "eos_token_id"),  # an id that is in any vocabulary
}


def miniature(config):
    """A copy of the config with two layers, or one of each kind, and small sizes. InputError: some
    layers have no attention, or the model reads more than text."""
    if config.get_text_config() is not config:  # Gemma 3 with images, for example
        raise InputError("it reads more than text; expected its text model alone")
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    for kind in kinds:
        if "attention" not in kind or "linear" in kind:  # a convolution, a recurrence
            raise InputError(f"its layers of kind {kind} are not supported")
    config, shared = copy.deepcopy(config), getattr(config, "num_kv_shared_layers", None)
    layers = max(2, len(kinds) * (2 if shared else 1))  # in Gemma 4 the last ones share keys
    small = {key: size for size, keys in SMALL.items() for key in keys}
    small |= {"num_hidden_layers": layers, "layer_types": (kinds * 2)[:layers]}
    small["num_kv_shared_layers"] = len(kinds)
    for key in [key for key in small if getattr(config, key, None)]:
        setattr(config, key, small[key])
    return config


def miniature_model(build, config):
    """build(miniature(config)) in fp32. Its random weights are so large that a cap on scores or
    logits changes the result. devices=[]: otherwise fork_rng would start every GPU."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        model = build(miniature(config)).float().eval()
        for p in model.parameters():
            size = (p.std(correction=0) * p.shape[-1] ** 0.5 / 2).clamp(min=1e-3)
            p.div_(size) if p.dim() > 1 else p.add_(torch.rand_like(p))
    return model
