import torch
import torch.nn.functional as F

from nanoalign.nf4 import LEVELS


def quantize(weight, blocksize=64):
    n = weight.numel()
    blocks = F.pad(weight.detach().flatten().float(), (0, -n % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp(min=1e-38)[:, None]
    midpoints = ((LEVELS[1:] + LEVELS[:-1]) / 2).to(scaled.device)
    codes = torch.bucketize(scaled, midpoints).flatten()[:n].to(torch.uint8)
    codes = F.pad(codes, (0, n % 2), value=7)
    return (codes[0::2] << 4 | codes[1::2])[:, None], absmax
