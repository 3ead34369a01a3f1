"""Compiles every kernel for a GPU that need not be there: python -m tests.kernels.compile_only 80 bfloat16 101376

Prints JSON: a list of [kernel, bytes of its cubin, shared memory, how often it was compiled, how many of its loads take
one 16-bit number at a time], and how many programs each decode kernel is for `DECODE`. The operators run as they are,
on tensors of the CPU, but where they would start a kernel it is compiled for the given compute capability and not
started: their results are meaningless. The widths are those of size M, for decode also wider ones.
"""

import json
import re
import sys
from collections import Counter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# (H, d_head, R, d_rope): sizes M and XL, more heads than a program takes, and latents that no GPU here can hold.
DECODE = [(8, 64, 256, 64), (16, 64, 512, 64), (128, 64, 512, 64), (4, 32, 4096, 16)]
NARROW = re.compile(r"ld\.global[\w.:]*\.(?:b|u)16\b")


class Absent:
    """A driver for a GPU of this compute capability on which nothing is ever started."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def main(capability: int, dtype: torch.dtype, room: int) -> list:
    from moemla.kernels import tiling

    tiling.room = lambda tensor: room
    compiled, times = {}, Counter()

    def start(kernel, grid):
        def compile_only(*arguments, **named):
            made = kernel.warmup(*arguments, grid=grid, **named)
            name = kernel.fn.__name__
            if (name, made.hash) not in compiled:
                times[name] += 1
            compiled[name, made.hash] = made

        return compile_only

    driver.set_active(Absent(capability))
    JITFunction.__getitem__ = start
    everything(dtype)
    kinds = [
        [name, len(made.asm["cubin"]), made.metadata.shared, times[name], len(NARROW.findall(made.asm["ptx"]))]
        for (name, _), made in compiled.items()
    ]
    q, programs = torch.zeros(1, dtype=dtype), {"_latent_decode": set(), "_joint_decode": set()}
    for heads, width, rank, turned in DECODE:
        if tile := tiling.latent_decode(q, heads, width // 2, rank):
            programs["_latent_decode"].add((*tile.values(), rank, heads % 16))
        if tile := tiling.joint_decode(q, heads, rank, turned):
            programs["_joint_decode"].add((*tile.values(), rank, heads % 16))
    return [kinds, {name: len(held) for name, held in programs.items()}]


def everything(dtype: torch.dtype) -> None:
    """Each operator, forward and backward, with each of its options; lengths vary, and must not compile anew."""
    from moemla.kernels import decode, experts, rope, routing, tiling

    like = dict(dtype=dtype)
    angles = torch.zeros(1024, 32)
    for steps in (33, 64, 512):
        x = torch.zeros(2, 8, steps, 64, **like)
        rope.rope(x, angles, angles, None, 3, False, False)
        rope.rope(x, angles, angles, torch.zeros(2, steps, dtype=torch.long), 0, True, True)
    bias = torch.zeros(62)
    for tokens in (17, 64, 8192):
        logits = torch.zeros(tokens, 62, requires_grad=True)
        for softmax in (False, True):
            gate, _, plain, _ = routing.route(logits, bias, torch.zeros(tokens) > 0, 6, softmax, False, True, 1.0)
            torch.autograd.grad(gate.sum() + plain.sum(), logits)
    for width in (32, 256):
        for activation, factor in (("gelu", 1), ("swiglu", 2)):
            w_in = torch.zeros(62, 512, factor * width, requires_grad=True, **like)
            w_out = torch.zeros(62, width, 512, requires_grad=True, **like)
            for tokens in (700, 720):
                x = torch.zeros(tokens, 512, requires_grad=True, **like)
                index, gate = torch.zeros(tokens, 6).long(), torch.zeros(tokens, 6, requires_grad=True, **like)
                out = experts.routed_experts(x, w_in, w_out, index, gate, activation)[0]
                torch.autograd.grad(out.sum(), (x, w_in, w_out, gate))
    for heads, width, rank, turned in DECODE:
        q, asked = torch.zeros(2, heads, width, **like), torch.zeros(2, heads, rank + turned, **like)
        weight, angles = torch.zeros(heads * width, rank, **like), torch.zeros(1024, width // 2)
        for slots in (100, 512, 1000):
            latent, joint = torch.zeros(2, slots, rank, **like), torch.zeros(2, slots, rank + turned, **like)
            if tiling.latent_decode(q, heads, width // 2, rank):
                bias, lengths = weight[:, 0].contiguous(), torch.zeros(2).int()
                decode.latent_decode(q, latent, latent, weight, bias, angles, angles, lengths, True, 0.1)
            if tiling.joint_decode(asked, heads, rank, turned):
                decode.joint_decode(asked, joint, None, rank, 0.1)


if __name__ == "__main__":
    triton.knobs.compilation.always_compile = True
    print(json.dumps(main(int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3]))))
