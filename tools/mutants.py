"""The museum of wrong versions: each is a patch of a line or two to the library that still runs, and must be caught.

python -m tools.mutants            try every mutant on a copy, print the table, exit with 1 if one survives
python -m tools.mutants NAME ...   only these
python -m tools.mutants --write    try all and keep the table as book/mutants.md
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2  # mutants at a time, one thread each
CARRIED = ("moemla", "tests", "tools", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """What goes wrong (`story`), where, and the tests that should notice. `old` stands in the module exactly once."""

    name: str
    story: str
    module: str
    old: str
    new: str
    tests: str
    only: str = ""  # pytest -k


MUSEUM = (
    Mutant(
        "bias-in-gate",
        "The balancing bias flows into the gate's value, and so into the output and its gradient.",
        "routing",
        "gate = plain.gather(-1, index)",
        "gate = biased.gather(-1, index)",
        "test_routing.py",
    ),
    Mutant(
        "bias-per-micro-batch",
        "The bias moves after each micro-batch instead of once a step.",
        "training",
        "        loss.backward()\n",
        "        loss.backward()\n        balancer.step()\n",
        "test_training.py",
        "micro",
    ),
    Mutant(
        "counts-twice-under-checkpointing",
        "Activation checkpointing repeats the forward pass, and the tokens are counted again.",
        "routing",
        "or torch._C._current_graph_task_id() == -1",
        "or True",
        "test_routing.py test_moe.py test_model.py",
        "checkpoint or count",
    ),
    Mutant(
        "counted-in-eval",
        "Validation batches move the bias.",
        "routing",
        "if self.training and not logits.is_meta",
        "if not logits.is_meta",
        "test_routing.py",
    ),
    Mutant(
        "softmax-after-top-k",
        "The gates are a softmax over the chosen logits instead of the chosen scores over their sum.",
        "routing",
        "gate = plain.gather(-1, index)",
        "gate = logits.gather(-1, index).softmax(-1)",
        "test_routing.py",
    ),
    Mutant(
        "latent-rotated",
        "The rotation is left out after the heads are rebuilt from the cache: positions live in the query only.",
        "latent_attention",
        "k = self._rotate(split_heads(self.k_up(k_latent.squeeze(1)), self.n_heads))  # slot s holds position s",
        "k = split_heads(self.k_up(k_latent.squeeze(1)), self.n_heads)",
        "test_latent_attention.py",
    ),
    Mutant(
        "rope-layouts-mixed",
        "Interleaved pairs are turned as if they were halves.",
        "rope",
        "return x.unflatten(-1, (half, 2)).flip(-1).flatten(-2)",
        "return x.unflatten(-1, (2, half)).flip(-2).flatten(-2)",
        "test_rope.py",
    ),
    Mutant(
        "cache-advanced-twice",
        "A step is counted twice, so the next token lands one slot too far.",
        "model",
        "cache.advance(steps if lengths is None else lengths.tolist())",
        "cache.advance(steps if lengths is None else lengths.tolist()); cache.advance(1)",
        "test_model.py test_generation.py",
    ),
    Mutant(
        "padding-counted",
        "Padding is routed and counted like a token.",
        "routing",
        "            one = one * self.valid[:, None]\n",
        "            pass\n",
        "test_routing.py",
    ),
    Mutant(
        "padding-gated",
        "Padding gets experts.",
        "routing",
        "        gate = gate * valid[:, None]\n",
        "        pass\n",
        "test_routing.py",
    ),
    Mutant(
        "padding-in-the-loss",
        "Targets at padding are scored.",
        "model",
        "targets = targets.masked_fill(~self._valid(tokens, lengths), -1)",
        "pass",
        "test_model.py",
    ),
    Mutant(
        "position-off-by-one-after-prefill",
        "The first generated token gets the position of the last prompt token.",
        "cache",
        "return torch.tensor(rows, device=device)[:, None] + torch.arange(steps, device=device)",
        "return (torch.tensor(rows, device=device)[:, None] - (steps == 1)).clamp(min=0) + "
        "torch.arange(steps, device=device)",
        "test_attention.py test_latent_attention.py",
    ),
    Mutant(
        "router-in-bfloat16",
        "Router and bias follow .bfloat16(): an update of 0.001 to a bias near 1 vanishes.",
        "devices",
        "narrow = moved.is_floating_point() and moved.element_size() < 4",
        "narrow = False",
        "test_routing.py",
    ),
    Mutant(
        "mask-off-by-one",
        "A token does not see itself.",
        "cache",
        "slots <= self.cache.positions",
        "slots < self.cache.positions",
        "test_cache.py test_attention.py",
    ),
    Mutant(
        "no-mask",
        "Training looks ahead.",
        "attention",
        "causal = mask is None\n",
        "causal = False\n",
        "test_attention.py",
    ),
    Mutant(
        "absorbed-without-bias",
        "The absorbed form forgets the bias of W^Vr.",
        "latent_attention",
        "value if v_up.bias is None else value + v_up.bias",
        "value",
        "test_latent_attention.py",
    ),
    Mutant(
        "absorbed-under-dropout",
        "The absorbed form is used where dropout makes it wrong.",
        "latent_attention",
        "if absorb and lossy",
        "if False",
        "test_latent_attention.py",
    ),
    Mutant(
        "wrong-scale",
        "The decoupled form scales by the width without the rotated part.",
        "latent_attention",
        "(d_nope + rope.width) ** -0.5",
        "d_nope**-0.5",
        "test_latent_attention.py",
    ),
    Mutant(
        "algorithm-1-mended",
        "Algorithm 1 with the target k/N_r, which is not what is printed.",
        "balancing",
        "1 / len(bias))",
        "top_k / len(bias))",
        "test_balancing.py",
    ),
    Mutant(
        "counts-never-forgotten",
        "The load is summed over the whole run instead of a step.",
        "routing",
        "        self.load.zero_()\n",
        "        pass\n",
        "test_balancing.py",
    ),
    Mutant(
        "auxiliary-loss-not-divided-by-k",
        "The Switch loss takes a token's share for each of its k experts: uniform routing costs k instead of 1.",
        "balancing",
        "taken / (count * top_k) if",
        "taken / count if",
        "test_balancing.py",
    ),
    Mutant(
        "quantile-drifts",
        "The quantile rule's biases are not brought back to mean 0.",
        "balancing",
        "return moved - moved.mean()",
        "return moved",
        "test_balancing.py",
    ),
    Mutant(
        "indexed-weights",
        "The loop indexes the experts: the backward makes a gradient the size of all experts for each one.",
        "experts",
        "zip(tokens, gates, w_in.unbind(), w_out.unbind(), strict=True)",
        "zip(tokens, gates, [w_in[e] for e in range(n_experts)], [w_out[e] for e in range(n_experts)], strict=True)",
        "test_experts.py",
    ),
    Mutant(
        "gate-missing-in-a-gradient",
        "The hand-written backward forgets the gate where it takes the gradient of W_out.",
        "experts",
        "slots.product_of_blocks(hidden * weight, dy)",
        "slots.product_of_blocks(hidden, dy)",
        "test_experts.py",
    ),
    Mutant(
        "gate-gradient-unsorted",
        "The gates' gradient is left in the sorted order.",
        "experts",
        "each.index_select(0, slots.place).view_as(gate)",
        "each.view_as(gate)",
        "test_experts.py",
    ),
    Mutant(
        "frozen-frequencies",
        "Learnable frequencies are read from a table made at the start: they never learn.",
        "rope",
        "where[..., None] * self.inv_freq",
        "where[..., None] * self.inv_freq.detach()",
        "test_rope.py",
    ),
    Mutant(
        "gate-applied-twice",
        "The gate weighs hidden activations and outputs.",
        "experts",
        "(hidden @ second) * weight[:, None])",
        "(hidden @ second) * weight[:, None] * weight[:, None])",
        "test_experts.py",
    ),
    Mutant(
        "wrong-token",
        "The sorted slots are mapped back to the wrong tokens.",
        "experts",
        "(order // top_k)",
        "(order % len(x))",
        "test_experts.py",
    ),
    Mutant(
        "residual-scale",
        "Matrices that write to the residual stream are not made smaller at the start.",
        "model",
        "INIT_STD / (2 * self.config.n_layers) ** 0.5",
        "INIT_STD",
        "test_model.py",
    ),
    Mutant(
        "one-seed-for-all",
        "All rows of a batch draw the same random numbers.",
        "generation",
        "[int(seed) + row for row in range(len(prompts))]",
        "[int(seed) for row in range(len(prompts))]",
        "test_generation.py",
    ),
    Mutant(
        "loss-over-padding",
        "Ignored targets count in the mean.",
        "losses",
        "count = valid.sum().clamp(min=1)",
        "count = torch.tensor(len(targets))",
        "test_losses.py",
    ),
    Mutant(
        "heads-not-woven",
        "On the way to `transformers` the keys of all heads come first, then all values, instead of head by head.",
        "interop",
        'rearrange(torch.cat((k_up, v_up), dim=1), "h k r -> (h k) r")',
        "torch.cat((k_up.flatten(0, 1), v_up.flatten(0, 1)))",
        "test_interop.py",
    ),
    Mutant(
        "balancing-bias-left-behind",
        "The exported router has a bias of zero, and chooses other experts.",
        "interop",
        '"mlp.gate.e_score_correction_bias", SAME)',
        '"mlp.gate.e_score_correction_bias", (lambda config, bias: (0 * bias,),) * 2)',
        "test_interop.py",
    ),
    Mutant(
        "rotation-rounded",
        "A bfloat16 model of `transformers` is made in float32 and moved, which rounds its rotary frequencies.",
        "interop",
        "from_config(made, dtype=weight.dtype).to(weight.device)",
        "from_config(made).to(weight.device, weight.dtype)",
        "test_interop.py",
    ),
    Mutant(
        "kernel-padding-lanes-chosen",
        "The router's kernel forgets that 62 experts are not 64 lanes: two lanes of padding can be chosen.",
        "kernels/routing",
        'left = tl.where(expert, biased, -float("inf"))',
        "left = biased",
        "kernels/test_routing.py",
        "interpreted and padding",
    ),
    Mutant(
        "kernel-rows-of-the-next-expert",
        "The last tile of an expert is not masked and multiplies rows of the next one.",
        "kernels/experts",
        """    real = row < tl.load(offsets + expert + 1)
    slot = tl.load(order + row, mask=real, other=0)
    source = (slot // TOP_K if GATHER else row).to(tl.int64)
    col =""",
        """    real = row < tl.load(offsets + n_experts)
    slot = tl.load(order + row, mask=real, other=0)
    source = (slot // TOP_K if GATHER else row).to(tl.int64)
    col =""",
        "kernels/test_experts.py",
        "any_order",
    ),
    Mutant(
        "kernel-wrong-stride",
        "Tokens are read with the stride of the hidden layer instead of their own.",
        "kernels/experts",
        "left = tl.load(x + token[:, None] * x_row + d[None, :]",
        "left = tl.load(x + token[:, None] * width + d[None, :]",
        "kernels/test_experts.py",
        "interpreted and narrow",
    ),
    Mutant(
        "kernel-gate-twice",
        "The gate is applied to the hidden layer, and once more to the output.",
        "kernels/experts",
        '        out = tl.dot(hidden, right, input_precision="ieee")\n',
        '        out = tl.dot(hidden, right, input_precision="ieee")\n'
        "        out *= tl.load(gate + slot, mask=real, other=0.0).to(tl.float32)[:, None]\n",
        "kernels/test_experts.py",
        "interpreted and narrow",
    ),
    Mutant(
        "kernel-gate-missing-backward",
        "The gradient of the hidden layer is not weighed by the gate.",
        "kernels/experts",
        "    u *= weight\n",
        "",
        "kernels/test_experts.py",
        "interpreted and equals",
    ),
    Mutant(
        "kernel-merge-without-shares",
        "The pieces of a long cache are joined as if each had the same sum of exponentials.",
        "kernels/decode",
        "shrink, share = tl.exp(highest - safe), tl.exp(log - safe)",
        "shrink, share = tl.exp(highest - safe), 1.0",
        "kernels/test_decode.py",
        "interpreted and pieces",
    ),
    Mutant(
        "kernel-softmax-without-shrinking",
        "The online softmax finds a larger score and does not shrink what it has summed up so far.",
        "kernels/decode",
        "    context = context * shrink[:, None]\n",
        "",
        "kernels/test_decode.py",
        "interpreted and pieces",
    ),
    Mutant(
        "kernel-lengths-ignored",
        "A short row of a batch sees the slots of the longest one.",
        "kernels/decode",
        """        last = tl.minimum(last, tl.load(lengths + row).to(tl.int32))
    head, lane, tail""",
        """        last = last
    head, lane, tail""",
        "kernels/test_decode.py",
        "interpreted and unequal",
    ),
    Mutant(
        "kernel-turned-the-same-way-back",
        "The gradient of a rotation is turned forwards instead of back.",
        "kernels/rope",
        "interleaved, not inverse), *[None] * 6",
        "interleaved, inverse), *[None] * 6",
        "kernels/test_rope.py",
        "interpreted",
    ),
    Mutant(
        "kernel-unstable-dispatch",
        "Slots of one block are all put at the expert's first row: they overwrite each other.",
        "kernels/dispatch",
        "row = tl.sum(chosen * (before + start[None, :]), axis=1)",
        "row = tl.sum(chosen * start[None, :], axis=1)",
        "kernels/test_experts.py",
        "interpreted and dispatch",
    ),
    Mutant(
        "shared-latents-broadcast",
        "A key and a value that all heads share are written out for each head: same numbers, H times the bytes.",
        "attention",
        "F.scaled_dot_product_attention(q.transpose(1, 2), k, v.unsqueeze(1), mask, scale=scale).transpose(1, 2)",
        "torch.matmul((q @ k.mT * scale).softmax(-1), v.unsqueeze(1))",
        "test_attention.py",
        "copied",
    ),
    Mutant(
        "results-of-another-text",
        "A result's name says nothing of its text: two texts want one file.",
        "cells",
        'parts.append(settings["data"][:6])',
        "pass",
        "experiments/test_runner.py",
        "two_texts",
    ),
    Mutant(
        "texts-averaged",
        "Runs on two texts, or of two lengths, go into one mean.",
        "experiments/latent_cost",
        '    return comparable(*found, differ_in=("variant", "lr", "seed"))',
        "    return found",
        "experiments/test_latent_cost.py",
        "another_kind",
    ),
    Mutant(
        "keys-of-all-settings",
        "A key hashes all settings: one that comes later changes every key, and all is trained again.",
        "cells",
        "if name not in FREE[part] and value != table.get(name, ...)",
        "if name not in FREE[part]",
        "test_cells.py",
        "kept_for_ever or in_the_table",
    ),
    Mutant(
        "loads-are-buffers",
        "The loads are buffers: DDP overwrites every rank's by those of rank 0, and the total still looks right.",
        "routing",
        "self.load = torch.zeros(n_experts, device=device, dtype=torch.int64)",
        'self.register_buffer("load", torch.zeros(n_experts, device=device, dtype=torch.int64), persistent=False)',
        "test_ranks.py",
        "loads",
    ),
    Mutant(
        "router-in-16-bits",
        "The router multiplies in the type that its weight comes in: bfloat16 under FSDP2's mixed precision.",
        "routing",
        "logits = flat.to(wide) @ self.weight.to(wide).T",
        "logits = flat.to(self.weight.dtype) @ self.weight.T",
        "test_routing.py",
        "narrowed",
    ),
    Mutant(
        "switch-loss-of-each-part",
        "Each micro-batch is balanced alone: the Switch loss takes the loads of the part instead of the step's.",
        "training",
        "switch_loss(routing, counts=counts[layer])",
        "switch_loss(routing)",
        "test_training.py",
        "parts",
    ),
    Mutant(
        "mean-of-means",
        "Micro-batches weigh alike, however few targets one of them has.",
        "training",
        "loss = loss / (sum(scored) / here) if here else loss * 0",
        "loss = loss / len(rows)",
        "test_training.py",
        "weighed",
    ),
    Mutant(
        "shown-routing-keeps-the-graph",
        "What is kept to be looked at holds the graph, and with it the memory, of a pass without backward.",
        "routing",
        "self.last = routing.detach()",
        "self.last = routing",
        "test_routing.py",
        "graph",
    ),
    Mutant(
        "auxiliary-loss-without-gradient",
        "Under reentrant checkpointing an auxiliary loss has a value and no gradient, and nothing says so.",
        "routing",
        "if self.recorded_with_gradients and not torch.is_grad_enabled():",
        "if False:",
        "test_routing.py",
        "checkpointing",
    ),
    Mutant(
        "matrices-by-prefix",
        "Of a wrapped model no matrix is found by its name, and AdamW trains what Muon should.",
        "optim",
        '("blocks" in path or',
        '(name.startswith("blocks.") or',
        "test_optim.py",
        "wrapping",
    ),
    Mutant(
        "copying-unsaid",
        "Targets that are the tokens themselves train the identity, and nothing says so.",
        "model",
        "not torch.compiler.is_compiling() and _copies(tokens, targets):",
        "False:",
        "test_moves.py",
        "said_once",
    ),
    Mutant(
        "trained-head-dropped",
        "The head is left out of a file because the config says tied, though the two tables were parted.",
        "model",
        "return same_storage(self.head.weight, self.embedding.weight)",
        "return self.config.tie_embeddings",
        "test_moves.py",
        "is_saved or assigns",
    ),
    Mutant(
        "tables-part-when-moved",
        "After `to_empty` head and embedding are two parameters.",
        "model",
        "        if tied:  # `to_empty` has",
        "        if False:  # `to_empty` has",
        "test_moves.py",
        "one_table",
    ),
    Mutant(
        "meta-tables-stay",
        "Weights are assigned to a model of the meta device, its rotary tables stay there, and the first pass fails.",
        "rope",
        'if self.cos.device.type == "meta" != x.device.type:',
        "if False:",
        "test_moves.py",
        "without_any",
    ),
    Mutant(
        "reset-of-the-parts-alone",
        "`reset_parameters` draws each layer's default instead of the model's own initial weights.",
        "model",
        "        super().reset_parameters()\n        self._initialise()\n",
        "        super().reset_parameters()\n",
        "test_moves.py",
        "same_seed",
    ),
    Mutant(
        "evaluate-prints-nan",
        "A model whose logits are not numbers is scored all the same.",
        "evaluation",
        "    if len(wrong):\n",
        "    if False:\n",
        "test_evaluation.py",
        "numbers",
    ),
    Mutant(
        "perplexity-overflows",
        "A loss above 709 nats ends in OverflowError instead of perplexity inf.",
        "evaluation",
        "perplexity(per_token), bits",
        "math.exp(per_token), bits",
        "test_evaluation.py",
        "beyond",
    ),
    Mutant(
        "generates-from-nan",
        "Greedy generation takes the argmax of logits that are not numbers.",
        "generation",
        "            if not logits.isfinite().all():\n",
        "            if False:\n",
        "test_generation.py",
        "numbers",
    ),
    Mutant(
        "exports-nan",
        "Weights that are not numbers are given away.",
        "interop",
        "        if not weight.isfinite().all():\n",
        "        if False:\n",
        "test_interop.py",
        "numbers",
    ),
    Mutant(
        "cache-of-another-text",
        "A cache that holds another prompt is taken for the beginning of this one.",
        "generation",
        "if kept[row][:length] != text[:length]:",
        "if False:",
        "test_generation.py",
        "another_text or knows",
    ),
    Mutant(
        "cache-forgets-rows",
        "The rows of a cache are chosen and its notes of their tokens are not.",
        "cache",
        "        self.tokens = self.tokens.index_select(0, index)\n",
        "",
        "test_generation.py",
        "knows",
    ),
    Mutant(
        "cache-of-another-model",
        "A cache that another model filled, or this one before it was trained on, is taken for its own.",
        "generation",
        "if not _filled_by(model, cache):",
        "if False:",
        "test_generation.py",
        "another_model or before_a_step",
    ),
    Mutant(
        "export-pads-on-the-right",
        "The exported tokenizer fills a batch behind the prompts.",
        "interop",
        'padding_side="left"',
        'padding_side="right"',
        "test_interop.py",
        "pipeline",
    ),
    Mutant(
        "export-without-start-token",
        "The exported tokenizer puts no start token before a text, as training did.",
        "interop",
        "add_bos_token=True",
        "add_bos_token=False",
        "test_interop.py",
        "pipeline",
    ),
    Mutant(
        "export-turns-halves",
        "The rows of an export stay in halves while its config says that neighbours turn.",
        "interop",
        'if c.rope_layout == "halves" else 0',
        "if False else 0",
        "test_interop.py",
        "exported_form",
    ),
    Mutant(
        "frozen-blocks-train",
        "Generation leaves every module in the mode of the whole model: frozen blocks train again.",
        "generation",
        "            module.training = training\n",
        "            module.training = modes[0][1]\n",
        "test_generation.py test_evaluation.py",
        "frozen",
    ),
    Mutant(
        "evaluate-holds-all-logits",
        "The logits of a whole batch exist at once: 1.6 GB and as much again at GPT-2's vocabulary.",
        "evaluation",
        "parts = zip(x.split(CHUNK), targets.split(CHUNK), strict=True)",
        "parts = [(x, targets)]",
        "test_evaluation.py",
        "blocks or memory",
    ),
    Mutant(
        "compiles-for-every-end",
        "A row that ends makes the batch smaller, and code is compiled for the new size.",
        "generation",
        "shrinks = not compiled or cache is None",
        "shrinks = True",
        "test_generation.py",
        "new_graph",
    ),
    Mutant(
        "two-writers-one-temporary-name",
        "Two processes write one file under the same temporary name, and one renames the other's half.",
        "files",
        "{os.getpid()}-{secrets.token_hex(4)}.tmp",
        "1-00000000.tmp",
        "test_files.py",
    ),
    Mutant(
        "living-files-swept",
        "What another process is just writing is taken for the leftover of a killed one and removed.",
        "files",
        "            if _lock(file):\n",
        "            if _lock(file) is not None:\n",
        "test_files.py",
    ),
    Mutant(
        "prepare-claims-nothing",
        "Two prepare into one folder at the same time, and it holds the stories of one under the record of the other.",
        "data",
        'with claimed(out, "moemla prepare"):',
        "with open(os.devnull):",
        "test_data.py",
        "two_at_once",
    ),
    Mutant(
        "prepare-overwrites",
        "Files of the user that bear the names of prepare's own are overwritten.",
        "data",
        "if os.path.lexists(out / name) and name not in ours:",
        "if False:",
        "test_data.py",
        "overwrites or users",
    ),
    Mutant(
        "prepare-rewrites-its-input",
        "A file that is both input and output is replaced by what was made of it.",
        "data",
        "same = path.exists() and (out / name)",
        "same = False and (out / name)",
        "test_data.py",
        "input",
    ),
    Mutant(
        "flipped-bit-passes",
        "A bit that flipped on the disk is trained on: the tokens' checksum is not compared.",
        "shards",
        "if of_tokens not in (None, found):",
        "if False:",
        "test_data.py",
        "bit",
    ),
    Mutant(
        "ids-beyond-vocabulary-pass",
        "Token ids beyond the vocabulary reach the embedding.",
        "shards",
        '>= self.vocab_size:\n            raise self._damaged(f"token',
        '> 65_535:\n            raise self._damaged(f"token',
        "test_data.py",
        "version_before or large",
    ),
    Mutant(
        "dropout-in-the-tokenizer",
        "A tokenizer that drops merges at random has the hash of the one that does not, and gives a text other ids.",
        "tokenizer",
        '("dropout", "continuing_subword_prefix",',
        '("continuing_subword_prefix",',
        "test_tokenizer.py",
        "otherwise",
    ),
    Mutant(
        "long-runs-learnt-whole",
        "Learning from one unbroken run takes the square of its length.",
        "tokenizer",
        "pre_tokenizers.Sequence([words, parts])",
        "words",
        "test_tokenizer.py",
        "one_long_run",
    ),
    Mutant(
        "long-stories-encoded-whole",
        "A long story goes through the library in one piece and takes a hundred times its size in memory.",
        "tokenizer",
        "while end := _END_OF_WORD.search(text, start + PIECE):",
        "while end := None:",
        "test_tokenizer.py",
        "little_memory",
    ),
    Mutant(
        "nan-weights-enter",
        "Weights with NaN are loaded, and a bias of NaN makes a plausible wrong model.",
        "checkpoint",
        "    if not tensor.to(dtype or tensor.dtype).isfinite().all():\n",
        "    if False:\n",
        "test_checkpoint.py",
        "no_numbers",
    ),
    Mutant(
        "int-weights-enter",
        "Weights in whole or complex numbers are cast without a word.",
        "checkpoint",
        "    if tensor.dtype not in FLOATS:\n",
        "    if False:\n",
        "test_checkpoint.py",
        "floating",
    ),
    Mutant(
        "damage-stops-resume",
        "A damaged newest checkpoint stops the run though a good older one lies beside it.",
        "checkpoint",
        "            failed.append((path, error))\n            continue\n",
        "            raise error\n",
        "test_checkpoint.py",
        "older_checkpoint",
    ),
    Mutant(
        "flipped-bit-passes",
        "A flipped bit in a checkpoint is loaded.",
        "checkpoint",
        "summed and sums.get(name) != _sum(folder / name)",
        "False",
        "test_checkpoint.py",
        "older_checkpoint",
    ),
    Mutant(
        "two-trainings-one-folder",
        "Two processes train in one folder and delete each other's checkpoints.",
        "training",
        'with claimed(out, "moemla train"), undisturbed(device):',
        "with undisturbed(device):",
        "test_training.py",
        "second_process",
    ),
    Mutant(
        "written-before-it-works",
        "A start that fails has already written the run that is then in the way.",
        "training",
        "    run.check(resume)\n",
        "    run.check(resume)\n    run.begin()\n",
        "test_training.py",
        "first_step_that_fails",
    ),
    Mutant(
        "old-run-unreadable",
        "A run without a field that came since cannot go on.",
        "config",
        "    return ADDED.get(name, {}) | values\n",
        "    return values\n",
        "test_training.py",
        "came_since",
    ),
    Mutant(
        "data-relative-to-the-start",
        "The data of a run is looked for where the command is started.",
        "checkpoint",
        "candidates = [run / folder, Path(",
        "candidates = [Path(folder)] if True else [Path(",
        "test_training.py",
        "from_anywhere",
    ),
    Mutant(
        "reader-ends-training",
        "A reader that leaves (head) ends the training without a checkpoint.",
        "cli",
        "        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())\n",
        "        raise\n",
        "test_cli.py",
        "reader_has_gone",
    ),
    Mutant(
        "denormals-stay-flushed",
        "After a training the caller's denormal numbers are zero.",
        "devices",
        "            torch.set_flush_denormal(flushed)\n",
        "            pass\n",
        "test_training.py",
        "settings_of_torch",
    ),
    Mutant(
        "load-moves-the-generator",
        "Loading a model moves the caller's random numbers.",
        "checkpoint",
        "    with undisturbed(device):\n",
        "    if True:\n",
        "test_checkpoint.py",
        "random_numbers_alone",
    ),
    Mutant(
        "validation-leaves-eval",
        "After a validation the model trains in eval mode: no dropout, no counts.",
        "training",
        "            model.train()\n",
        "            pass\n",
        "test_training.py",
        "validation_changes",
    ),
    Mutant(
        "check-without-gradients",
        "A check compares outputs alone: a value cut off from its gradient passes.",
        "checks/compare",
        "for name, mine, right in zip(ours, *pairs, strict=True):",
        "for name, mine, right in ():",
        "checks/test_checks.py",
    ),
    Mutant(
        "check-moves-the-generator",
        "A check seeds torch's own generator: what a reader draws after it is the same each time.",
        "checks/compare",
        "with torch.random.fork_rng(devices=()):",
        "if True:",
        "checks/test_checks.py",
    ),
    Mutant(
        "another-cells-result",
        "A result is found by its name alone: a cell of another length or warm-up is given it.",
        "experiments/runner",
        "            same(shelf[cell.name], cell.settings, path_of(cell, folder))\n",
        "",
        "experiments/test_runner.py",
        "other_settings",
    ),
    Mutant(
        "unfinished-runs-shown",
        "Chapters, pages and the ledger read the runs of an experiment before all are there.",
        "experiments/runner",
        "for tally in tallies(runs) if tally.complete for run",
        "for tally in tallies(runs) for run",
        "experiments/test_runner.py",
        "is_complete",
    ),
    Mutant(
        "renamed-results",
        "A result is what its path says, whatever stands inside.",
        "results",
        '_require(data["name"] == name, source',
        "_require(True, source",
        "test_results.py",
        "not_what_it_says",
    ),
    Mutant(
        "cells-inherit-defaults",
        "A cell takes what it does not give from the class: when a default changes, a cell becomes another one.",
        "cells",
        '**{**_frozen("model"), **given}',
        "**given",
        "test_cells.py",
        "inherit",
    ),
)


def attempt(mutant: Mutant) -> tuple[bool, str]:
    """Applies the patch to a copy and runs the tests: (caught, the first test that failed or what happened instead)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in CARRIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        path = copy / "moemla" / f"{mutant.module}.py"
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            return (
                False,
                f"the patch does not fit: its text stands {text.count(mutant.old)} times in {mutant.module}.py",
            )
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no"]
        command += [f"tests/{name}" for name in mutant.tests.split()] + (["-k", mutant.only] if mutant.only else [])
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if done.returncode == 1 and failed and failed[0].startswith("FAILED"):
            return True, failed[0].removeprefix("FAILED tests/").split(" - ")[0]
        return False, failed[0] if failed else f"no test failed (pytest ended with {done.returncode})"


def page(rows: list[tuple[Mutant, bool, str]]) -> str:
    """The table as a page of the book."""
    out = ["# A museum of wrong versions", ""]
    out += [
        "Each row is a patch of a line or two to the library. The patched library imports, runs and trains; at least",
        "",
    ]
    out[-2] += " one test fails on it. `make mutants` tries them all again."
    out += ["| what goes wrong | module | noticed by |", "|---|---|---|"]
    for mutant, _, test in rows:
        out.append(f"| {mutant.story} | `{mutant.module}` | `{test.split('[')[0].replace('::', ' ')}` |")
    return "\n".join(out) + "\n"


def main(arguments: list[str]) -> int:
    wanted = [name for name in arguments if not name.startswith("--")]
    chosen = [mutant for mutant in MUSEUM if not wanted or mutant.name in wanted]
    rows = []
    with ThreadPoolExecutor(WORKERS) as pool:  # each waits for a process of its own
        for mutant, (caught, test) in zip(chosen, pool.map(attempt, chosen), strict=True):
            rows.append((mutant, caught, test))
            print(f"{'caught  ' if caught else 'SURVIVED'} {mutant.name:36} {test}", flush=True)
    survivors = sum(not caught for _, caught, _ in rows)
    print(f"{len(rows) - survivors} of {len(rows)} mutants caught")
    if "--write" in arguments and not survivors and not wanted:
        (ROOT / "book" / "mutants.md").write_text(page(rows), encoding="utf-8")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
