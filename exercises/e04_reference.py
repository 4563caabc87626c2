"""4. The reference with the adapter off (lora.py)

DPO and KTO compare the policy with itself, as it was at the start. B of a new LoRA layer is zero
then, so the start is the same model with every change switched off: no second model is needed.

By hand: a layer of W = 2 and scaling * B A = 3 gives 5 x. Its reference gives 2 x, in a tensor that
does not require gradient, and afterwards the layer gives 5 x again.
"""


def reference_logps(lm, examples):
    """The log-probs of the completions under the reference: (C,), without gradient.

    lm is a module: lm(examples).logps are the policy's own log-probs (C,). Among lm.modules() are
    LoRALinear layers (nanoalign.lora); `enabled` switches one. The reference computes without
    dropout, as lm.eval() does. Afterwards all is as it was, training mode included, also if lm
    raises an error.
    """
    raise NotImplementedError
