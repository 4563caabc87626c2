"""The same numbers, sooner: what runs in training where the lesson has a plain definition.

Twins, under the names of their definitions (nanoalign.plain puts them aside):

    encode      chatml.each: ids_and_mask of many conversations
    attention   packing.attention
    dropout     nn.Dropout, in lora.py
    nf4         nf4.rebuild: dequantize and double_dequantize; nf4.FrozenProduct
    head        logps.token_logps
    paged       torch.optim.AdamW, in train.py: its states in the host's memory

Helpers, which no definition has: flex (attention on a GPU), transfer (numbers to a GPU), compiled
(generation without the compiler), miniature (a small model to try).
"""
