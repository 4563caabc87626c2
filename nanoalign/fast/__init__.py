"""Faster code for definitions of the lesson. It computes the same numbers, up to rounding.

A twin replaces one definition in training; nanoalign.plain puts the definition back:

    encode      chatml.each, and so ids_and_mask
    attention   packing.attention
    dropout     nn.Dropout in lora.py
    nf4         nf4.rebuild, and so dequantize and double_dequantize; nf4.FrozenProduct
    head        logps.token_logps
    paged       torch.optim.AdamW, in train.py: its states in the host's memory

A helper replaces nothing:

    flex        attention.py's kernel for GPUs
    transfer    tensors to a GPU without waiting for it
    compiled    generation with a model whose layers are compiled
    miniature   a small model for a test of its kind
"""
