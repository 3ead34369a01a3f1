"""The museum of wrong versions: patches that still import, run and train, and that at least one test must notice.

A paragraph of one line names the file that those below it patch. Each other one is a wrong version: its name; what
goes wrong, in one line; the patch, read as a diff (`- ` goes, `+ ` comes, two spaces stay; what goes and stays is found
in the file exactly once, and may be a part of a line); what pytest is given, best the one test that notices.

`python -m tools.mutants NAME` tries one, `make mutants` all.
"""

MUSEUM = r"""
moemla/config.py

old-run-unreadable
A run without a field that came since cannot go on.
-     return ADDED.get(name, {}) | values
+     return values
tests/test_runs.py::test_a_run_without_a_field_that_came_since_goes_on

moemla/files.py

two-writers-one-temporary-name
Two processes write one file under the same temporary name, and one renames the other's half.
- {os.getpid()}-{secrets.token_hex(4)}.tmp
+ 1-00000000.tmp
tests/test_files.py::test_two_writers_of_one_path_never_mix_and_the_last_one_stays

living-files-swept
What another process is just writing is taken for the leftover of a killed one and removed.
-             if _lock(file):
+             if _lock(file) is not None:
tests/test_files.py::test_two_writers_of_one_path_never_mix_and_the_last_one_stays

moemla/devices.py

router-in-bfloat16
Router and bias follow .bfloat16(): an update of 0.001 to a bias near 1 vanishes.
- narrow = moved.is_floating_point() and moved.element_size() < 4
+ narrow = False
tests/test_routing.py::test_float32_through_narrow_types

denormals-stay-flushed
After a training the caller's denormal numbers are zero.
-             torch.set_flush_denormal(flushed)
+             pass
tests/test_training.py::test_the_callers_settings_of_torch_stay

state-behind-the-failed-step
A run that diverges keeps the random state of after the step that failed.
-         torch.set_rng_state(cpu)
+         pass
tests/test_training.py::test_a_gradient_that_is_no_number_stops_before_it_does_harm

moemla/rope.py

rope-layouts-mixed
Interleaved pairs are turned as if they were halves.
- return x.unflatten(-1, (half, 2)).flip(-1).flatten(-2)
+ return x.unflatten(-1, (2, half)).flip(-2).flatten(-2)
tests/test_rope.py::test_equals_complex_multiplication

frozen-frequencies
Learnable frequencies are read from a table made at the start: they never learn.
- where[..., None] * self.inv_freq
+ where[..., None] * self.inv_freq.detach()
tests/test_rope.py::test_learnable_frequencies_begin_as_the_fixed_ones_and_have_a_gradient

meta-tables-stay
Weights are assigned to a model of the meta device, its rotary tables stay there, and the first pass fails.
- if self.cos.device.type == "meta" != x.device.type:
+ if False:
tests/test_moves.py::test_weights_assigned_to_a_model_without_any

moemla/cache.py

cache-of-whole-numbers
A cache of an integer type cuts latents down to whole numbers, and says nothing.
- require(dtype is None or dtype.is_floating_point, "dtype", dtype, "must be a floating type")
+ pass
tests/test_refusals.py::test_shapes_that_do_not_fit

position-off-by-one-after-prefill
The first generated token gets the position of the last prompt token.
- return _sent(rows, device)[:, None] + torch.arange(steps, device=device)
+ return (_sent(rows, device)[:, None] - (steps == 1)).clamp(min=0) + torch.arange(steps, device=device)
tests/test_attention.py::test_cached_equals_uncached

mask-off-by-one
A token does not see itself.
- slots <= self.cache.positions
+ slots < self.cache.positions
tests/test_cache.py::test_rows_of_different_length

cache-forgets-rows
The rows of a cache are chosen and its notes of their tokens are not.
-         self.tokens = self.tokens.index_select(0, index)
tests/test_generation.py::test_a_cache_knows_its_tokens_through_all_that_is_done_to_it

moemla/attention.py

no-mask
Training looks ahead.
- causal = mask is None
+ causal = False
tests/test_attention.py::test_against_a_softmax_loop

shared-latents-broadcast
A key and a value that all heads share are written out for each head: same numbers, H times the bytes.
- F.scaled_dot_product_attention(q.transpose(1, 2), k, v.unsqueeze(1), mask, scale=scale).transpose(1, 2)
+ torch.matmul((q @ k.mT * scale).softmax(-1), v.unsqueeze(1))
tests/test_attention.py::test_shared_values_are_copied_for_no_head

moemla/latent_attention.py

latent-rotated
The rotation is left out after the heads are rebuilt from the cache: positions live in the query only.
- k = self._rotate(split_heads(self.k_up(k_latent.squeeze(1)), self.n_heads))  # slot s holds position s
+ k = split_heads(self.k_up(k_latent.squeeze(1)), self.n_heads)
tests/test_latent_attention.py::test_cached_equals_uncached_absorbed_or_not

absorbed-without-bias
The absorbed form forgets the bias of W^Vr.
- value if v_up.bias is None else value + v_up.bias
+ value
tests/test_latent_attention.py::test_cached_equals_uncached_absorbed_or_not

absorbed-under-dropout
The absorbed form is used where dropout makes it wrong.
- if absorb and lossy
+ if False
tests/test_latent_attention.py::test_absorbing_is_refused_under_training_dropout

wrong-scale
The decoupled form scales by the width without the rotated part.
- (d_nope + rope.width) ** -0.5
+ d_nope**-0.5
tests/test_latent_attention.py::test_against_loops

moemla/losses.py

loss-over-padding
Ignored targets count in the mean.
- count = valid.sum().clamp(min=1)
+ count = torch.tensor(len(targets))
tests/test_losses.py::test_equals_cross_entropy

moemla/model.py

cache-advanced-twice
A step is counted twice, so the next token lands one slot too far.
- cache.advance(steps if lengths is None else lengths.tolist())
+ cache.advance(steps if lengths is None else lengths.tolist()); cache.advance(1)
tests/test_model.py::test_no_cache_is_prefill_is_one_token_at_a_time

padding-in-the-loss
Targets at padding are scored.
- targets = targets.masked_fill(~self._valid(tokens, lengths), -1)
+ pass
tests/test_model.py::test_padding_changes_nothing

residual-scale
Matrices that write to the residual stream are not made smaller at the start.
- INIT_STD / (2 * self.config.n_layers) ** 0.5
+ INIT_STD
tests/test_model.py::test_initialisation

copying-unsaid
Targets that are the tokens themselves train the identity, and nothing says so.
- not torch.compiler.is_compiling() and _copies(tokens, targets):
+ False:
tests/test_moves.py::test_targets_that_are_the_tokens_are_said_once

trained-head-dropped
The head is left out of a file because the config says tied, though the two tables were parted.
- return same_storage(self.head.weight, self.embedding.weight)
+ return self.config.tie_embeddings
tests/test_moves.py::test_a_head_that_is_no_longer_the_embedding_is_saved

tables-part-when-moved
After `to_empty` head and embedding are two parameters.
-         if tied:  # `to_empty` has
+         if False:  # `to_empty` has
tests/test_moves.py::test_one_table_stays_one_and_two_stay_two

reset-of-the-parts-alone
`reset_parameters` draws each layer's default instead of the model's own initial weights.
          super().reset_parameters()
-         self._initialise()
tests/test_moves.py::test_reset_parameters_is_the_constructor_with_the_same_seed

moemla/routing.py

mask-of-another-shape
A padding mask is flattened whatever its shape: that of (T, B) masks the wrong tokens.
- fits = valid.dtype == torch.bool and valid.shape == x.shape[:-1]
+ fits = True
tests/test_refusals.py::test_shapes_that_do_not_fit

bias-in-gate
The balancing bias flows into the gate's value, and so into the output and its gradient.
- gate = plain.gather(-1, index)
+ gate = biased.gather(-1, index)
tests/test_routing.py::test_against_loops

counts-twice-under-checkpointing
Activation checkpointing repeats the forward pass, and the tokens are counted again.
- or torch._C._current_graph_task_id() == -1
+ or True
tests/test_routing.py::test_activation_checkpointing_counts_once

counted-in-eval
Validation batches move the bias.
- if self.training and not logits.is_meta
+ if not logits.is_meta
tests/test_routing.py::test_counting_in_training_only

softmax-after-top-k
The gates are a softmax over the chosen logits instead of the chosen scores over their sum.
- gate = plain.gather(-1, index)
+ gate = logits.gather(-1, index).softmax(-1)
tests/test_routing.py::test_against_loops

padding-counted
Padding is routed and counted like a token.
-             one = one * self.valid[:, None]
+             pass
tests/test_routing.py::test_against_loops

padding-gated
Padding gets experts.
-         gate = gate * valid[:, None]
+         pass
tests/test_routing.py::test_against_loops

counts-never-forgotten
The load is summed over the whole run instead of a step.
-         self.load.zero_()
+         pass
tests/test_balancing.py::test_balancer_applies_its_rule_to_every_router_once

loads-are-buffers
The loads are buffers: DDP overwrites every rank's by those of rank 0, and the total still looks right.
- self.load = torch.zeros(n_experts, device=device, dtype=torch.int64)
+ self.register_buffer("load", torch.zeros(n_experts, device=device, dtype=torch.int64), persistent=False)
tests/test_ranks.py::test_loads_and_histograms_of_all_ranks_and_micro_batches

router-in-16-bits
The router multiplies in the type that its weight comes in: bfloat16 under FSDP2's mixed precision.
- logits = flat.to(wide) @ self.weight.to(wide).T
+ logits = flat.to(self.weight.dtype) @ self.weight.T
tests/test_routing.py::test_a_weight_narrowed_from_outside_is_multiplied_in_float32_with_a_warning

shown-routing-keeps-the-graph
What is kept to be looked at holds the graph, and with it the memory, of a pass without backward.
- self.last = routing.detach()
+ self.last = routing
tests/test_routing.py::test_a_pass_without_backward_keeps_no_graph

auxiliary-loss-without-gradient
Under reentrant checkpointing an auxiliary loss has a value and no gradient, and nothing says so.
- if self.recorded_with_gradients and not torch.is_grad_enabled():
+ if False:
tests/test_routing.py::test_auxiliary_losses_flow_through_checkpointing_or_are_refused

moemla/experts.py

gates-left-at-home
Rows are dispatched to their experts in backward, their gates are not.
- weight = exchange.dispatch(gate.flatten().index_select(0, slots.order)[:, None])
+ weight = gate.flatten().index_select(0, slots.order)[:, None]
tests/test_experts.py -k 'dispatcher'

indexed-weights
The loop indexes the experts: the backward makes a gradient the size of all experts for each one.
- zip(tokens, gates, w_in.unbind(), w_out.unbind(), strict=True)
+ zip(tokens, gates, [w_in[e] for e in range(n_experts)], [w_out[e] for e in range(n_experts)], strict=True)
tests/test_experts.py::test_loop_does_not_make_a_gradient_of_all_experts_for_each

gate-missing-in-a-gradient
The hand-written backward forgets the gate where it takes the gradient of W_out.
- blocks.product_of_blocks(hidden * weight, dy)
+ blocks.product_of_blocks(hidden, dy)
tests/test_experts.py::test_equals_loops_with_gradients

gate-gradient-unsorted
The gates' gradient is left in the sorted order.
- each.index_select(0, slots.place).view_as(gate)
+ each.view_as(gate)
tests/test_experts.py::test_equals_loops_with_gradients

gate-applied-twice
The gate weighs hidden activations and outputs.
- (hidden @ second) * weight[:, None])
+ (hidden @ second) * weight[:, None] * weight[:, None])
tests/test_experts.py::test_equals_loops_with_gradients

wrong-token
The sorted slots are mapped back to the wrong tokens.
- (order // top_k)
+ (order % len(x))
tests/test_experts.py::test_equals_loops_with_gradients

moemla/balancing.py

balancer-deaf-to-its-world
A balancer that was given a world of its own still sums over the default group.
-         if self.world is not None:
+         if False:
tests/test_ranks.py -k 'own'

algorithm-1-mended
Algorithm 1 with the target k/N_r, which is not what is printed.
- 1 / len(bias))
+ top_k / len(bias))
tests/test_balancing.py::test_algorithm_1_by_hand

auxiliary-loss-not-divided-by-k
The Switch loss takes a token's share for each of its k experts: uniform routing costs k instead of 1.
- taken / (count * top_k) if
+ taken / count if
tests/test_balancing.py::test_switch_loss_and_z_loss_by_hand

quantile-drifts
The quantile rule's biases are not brought back to mean 0.
- return moved - moved.mean()
+ return moved
tests/test_balancing.py::test_quantile_rule_against_sorted_margins

moemla/checkpoint.py

half-a-checkpoint-believed
What one node of several wrote counts as a checkpoint, and the whole ones are removed.
- if name not in held or held[name].shape != (tensor.shape or (1,)):
+ if False:
tests/test_parallel.py::test_what_rank_0_does_not_see_makes_no_checkpoint

unreadable-one-kept-for-a-good-one
A damaged later checkpoint counts among the last two that are kept.
- for old in [one for one in checkpoints(run) if one <= target][:-keep]:
+ for old in checkpoints(run)[:-keep]:
tests/test_checkpoint.py::test_a_later_one_that_could_not_be_read_is_none_of_the_last

nan-weights-enter
Weights with NaN are loaded, and a bias of NaN makes a plausible wrong model.
-     if not tensor.to(dtype or tensor.dtype).isfinite().all():
+     if False:
tests/test_checkpoint.py::test_weights_that_are_no_numbers_are_refused_where_they_enter

int-weights-enter
Weights in whole or complex numbers are cast without a word.
-     if tensor.dtype not in FLOATS:
+     if False:
tests/test_checkpoint.py::test_weights_of_no_floating_type_are_refused

damage-stops-resume
A damaged newest checkpoint stops the run though a good older one lies beside it.
-             failed.append((path, error))
-             continue
+             raise error
tests/test_checkpoint.py::test_the_older_checkpoint_is_taken_where_the_newest_is_damaged

flipped-bit-passes-in-checkpoint
A flipped bit in a checkpoint is loaded.
- summed and sums.get(name) != sha256(folder / name)
+ False
tests/test_checkpoint.py::test_the_older_checkpoint_is_taken_where_the_newest_is_damaged

load-moves-the-generator
Loading a model moves the caller's random numbers.
-     with undisturbed(device):
+     if True:
tests/test_checkpoint.py::test_load_leaves_the_callers_random_numbers_alone

moemla/checks/compare.py

check-without-gradients
A check compares outputs alone: a value cut off from its gradient passes.
- for name, mine, right in zip(leaves, *pairs, strict=True):
+ for name, mine, right in ():
tests/checks/test_checks.py::test_a_wrong_version_fails_in_one_line

check-moves-the-generator
A check seeds torch's own generator: what a reader draws after it is the same each time.
- with torch.random.fork_rng(devices=()):
+ if True:
tests/checks/test_checks.py::test_the_librarys_own_passes

moemla/checks/weights.py

linear-pieces-not-turned
A list of nn.Linear is taken for a weight in pieces as it lies, though nn.Linear keeps it the other way round.
- weight[number].T if turned else weight[number]
+ weight[number].reshape(weight[number].T.shape) if turned else weight[number]
tests/checks/test_weights.py::test_a_list_of_layers_is_a_weight_in_pieces

moemla/checks/building.py

rule-compared-with-itself
A rule that writes in place changes what the library's is then given.
- bias=bias.clone()
+ bias=bias
tests/checks/test_chapters.py::test_a_rule_may_write_in_place_and_a_router_must_give_the_index_first

moemla/checks/subjects.py

bias-of-the-library-alone
The library's layer is compared with a balancing bias that the reader's does not have.
-                 buffer.zero_()  # the layer has none
+                 pass
tests/checks/test_chapters.py::test_a_right_file_holds

moemla/checks/child.py

fork-reports-too
A file that forks has every line of its report twice.
- if os.getpid() != self.owner:
+ if False:
tests/checks/test_child.py::test_only_the_process_itself_reports

settings-of-the-file-stay
A file that turns gradients off has none that are right.
-     torch.set_grad_enabled(True)
+     pass
tests/checks/test_child.py::test_settings_of_the_file_are_taken_back

moemla/commands/check.py

children-of-the-file-stay
What a file starts goes on after its check.
- os.killpg(process.pid, signal.SIGKILL)
+ pass
tests/commands/test_check.py::test_what_a_file_does_besides_changes_nothing

moemla/commands/terminal.py

reader-ends-training
A reader that leaves (head) ends the training without a checkpoint.
-         os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
+         raise
tests/commands/test_train.py::test_training_goes_on_when_its_reader_has_gone

moemla/runs.py

nan-score-ends-a-run
A score that is no number ends a training, with words about JSON.
- valid_loss=valid_loss if valid_loss is None or math.isfinite(valid_loss) else None,
+ valid_loss=valid_loss,
tests/test_validation.py::test_a_score_that_is_no_number_ends_nothing

data-relative-to-the-start
The data of a run is looked for where the command is started.
- candidates = [run / folder, Path(
+ candidates = [Path(folder)] if True else [Path(
tests/test_runs.py::test_the_data_of_a_run_is_found_from_anywhere

moemla/data.py

prepare-claims-nothing
Two prepare into one folder at the same time, and it holds the stories of one under the record of the other.
- with claimed(out, "moemla prepare"):
+ with open(os.devnull):
tests/test_data.py::test_two_at_once_never_mix

prepare-overwrites
Files of the user that bear the names of prepare's own are overwritten.
- if os.path.lexists(out / name) and name not in ours:
+ if False:
tests/test_data.py::test_prepare_overwrites_nothing_that_it_did_not_make

prepare-rewrites-its-input
A file that is both input and output is replaced by what was made of it.
- same = path.exists() and (out / name)
+ same = False and (out / name)
tests/test_data.py::test_an_input_that_is_an_output_is_refused

moemla/evaluation.py

evaluate-prints-nan
A model whose logits are not numbers is scored all the same.
-     if len(wrong):
+     if False:
tests/test_evaluation.py::test_a_model_whose_nats_are_no_numbers_is_refused

perplexity-overflows
A loss above 709 nats ends in OverflowError instead of perplexity inf.
- perplexity(per_token), bits
+ math.exp(per_token), bits
tests/test_evaluation.py::test_a_perplexity_beyond_what_a_float_holds

evaluate-holds-all-logits
The logits of a whole batch exist at once: 1.6 GB and as much again at GPT-2's vocabulary.
- parts = zip(x.split(CHUNK), targets.split(CHUNK), strict=True)
+ parts = [(x, targets)]
tests/test_evaluation.py::test_blocks_of_rows_change_nothing

sequence-balance-of-the-batch
The load within a sequence is that of the whole batch: a balanced batch passes for balanced sequences.
- sequence=window(torch.cat(each, 1), context),
+ sequence=window(torch.stack(full), context),
tests/test_evaluation.py -k 'by_hand and sequence'

moemla/judge.py

one-order-counted
A text wins where one order prefers it and the other says tie: half of a judge's liking for a place.
- _SAME_SAID.get(self.answers, "tie")
+ (_SAME_SAID | {("first", "tie"): "a", ("second", "tie"): "b"}).get(self.answers, "tie")
tests/test_judge.py::test_a_text_wins_where_both_orders_say_so

ties-dropped-from-the-win-rate
The win rate is of decided matches alone: one win and nineteen ties are a rate of 1.
- (self.wins + self.ties / 2) / len(self.matches)
+ self.wins / self.decided if self.decided else 0.5
tests/test_judge.py::test_p_is_the_sign_test_over_decided_matches

moemla/quality.py

pronouns-in-speech
What somebody says of somebody else is held against who was named before.
- _marked(_SPEECH.sub(" ", text))
+ _marked(text)
tests/test_quality.py::test_pronouns

names-as-words
A phrase is unknown because its name is: a story is blamed for its people.
- ["NAME" if named else word for word, named in _marked(text)]
+ words(text)
tests/test_quality.py::test_phrases_by_hand

moemla/statistics.py

ties-lost
A tie is half a win to neither: two groups that are alike are not at one half.
- bisect_left(b, value) + bisect_right(b, value)
+ 2 * bisect_left(b, value)
tests/test_statistics.py::test_superiority_is_mann_and_whitney_s_u

moemla/paper/claims.py

inequality-all-of-it
A claim that something is below zero is contradicted by numbers of which only some lie above.
- text, low < target
+ text, high < target
tests/paper/test_claims.py -k 'another_status and A23'

moemla/commands/terminal.py

message-in-pieces
A line is written piece by piece, and what another process says falls in between.
-         stream.write(text + end)
+         print(text, end=end, file=stream)
tests/test_cli.py -k 'goes_wrong'

moemla/commands/train.py

ended-before-it-said-why
torchrun ends a rank that has lost another before it has said so.
-                 signal.signal(signal.SIGTERM, signal.SIG_IGN)
+                 pass
tests/test_torchrun.py -k 'says_first'

moemla/checkpoint.py

shipped-before-path
A model that ships is taken in place of the folder of that name that is there.
- if not path.exists() and path.parent == Path(SHIPPED):
+ if path.parent == Path(SHIPPED):
tests/test_checkpoint.py -k 'ships_loads'

moemla/experiments/comparison.py

rate-of-nobody
An arm that takes another's rate takes the first of the sweep instead.
- (chosen or {}).get(arm.rate_of or arm.name,
+ (chosen or {}).get(arm.name,
tests/experiments/test_comparison.py -k 'sweep_is_of'

seeds-of-one-arm-alone
A contrast pairs the seeds of an arm with others of the next: as many, and not the same.
- seeds = sorted(set.intersection(*(set(one) for one in losses)))
+ seeds = sorted(losses[0])
tests/experiments/test_comparison.py -k 'more_and_fewer'

seed-that-chose-measures
The run that chose a rate counts among those that measure it.
- and run.settings["train"]["seed"] > 0]
+ and run.settings["train"]["seed"] >= 0]
tests/experiments/test_comparison.py -k 'table_is_that'

moemla/experiments/runner.py

queue-waits-for-a-choice
While the last run of a sweep is at work nothing else is begun.
- waiting = [(cell, plan) for plan in plans for cell in plan.open(shelf)]
+ waiting = [(cell, plan) for plan in plans[:1] for cell in plan.open(shelf)]
tests/experiments/test_queue.py -k 'first_plan'

moemla/experiments/latent_cost.py

texts-averaged
Runs on two texts, or of two lengths, go into one mean.
-     return comparable(*runs, differ_in=("variant", "lr", "seed"))
+     return runs
tests/experiments/test_latent_cost.py -k 'another_kind'

moemla/cells.py

results-of-another-text
A result's name says nothing of its text: two texts want one file.
- parts.append(settings["data"][:6])
+ pass
tests/experiments/test_runner.py -k 'two_texts'

keys-of-all-settings
A key hashes all settings: one that comes later changes every key, and all is trained again.
- if name not in FREE[part] and value != table.get(name, ...)
+ if name not in FREE[part]
tests/test_cells.py -k 'kept_for_ever or in_the_table'

cells-inherit-defaults
A cell takes what it does not give from the class: when a default changes, a cell becomes another one.
- **{**_frozen("model"), **settings}
+ **settings
tests/test_cells.py -k 'inherit'

moemla/experiments/runner.py

another-cells-result
A result is found by its name alone: a cell of another length or warm-up is given it.
-                 same(shelf[place(cell)], cell.settings, path_of(cell, folder))
tests/experiments/test_runner.py -k 'other_settings'

unfinished-runs-shown
Chapters, pages and the ledger read the runs of an experiment before all are there.
- for tally in tallies(runs) if tally.complete for run
+ for tally in tallies(runs) for run
tests/experiments/test_runner.py -k 'is_complete'

moemla/footprint.py

one-copy-for-all-products
Under autocast every product keeps its own 16-bit copy of its input; one for all is too little.
-     return products * step.tokens * config.d_model * 2 if step.narrow else 0
+     return step.tokens * config.d_model * 2 if step.narrow else 0
tests/test_footprint.py::test_a_step_holds_what_is_predicted

ddp-buckets-forgotten
DDP's buckets hold every gradient a second time, all through a step.
- gradients=(numbers - spread) * WIDE if step.gpus > 1 and shards == 1 else 0
+ gradients=0
tests/test_footprint.py::test_ddp_keeps_a_second_copy_of_the_gradients

only-the-loss-is-looked-at
The head's loss is taken for the highest moment, whatever a feed-forward's backward or an optimizer holds.
-     return max(moments, key=lambda one: one.total)
+     return moments[0]
tests/test_footprint.py::test_a_step_holds_what_is_predicted

moemla/planning.py

recomputation-for-nothing
A second forward pass is planned as if it took no time.
- (4 if job.recompute else 3) * blocks
+ 3 * blocks
tests/test_planning.py::test_what_is_run_beyond_what_routing_asks_for

first-change-instead-of-the-smallest
A plan that does not fit is given shares over devices where more micro-batches would do.
- for recompute, parallel in dict.fromkeys(wider):
+ for recompute, parallel in reversed(dict.fromkeys(wider)):
tests/test_planning.py::test_the_smallest_change_that_fits_is_named

moemla/measuring.py

bytes-that-were-there-before
Weights that an optimizer changes in place are counted as new.
- if key not in before and key not in self._sizes:
+ if key not in self._sizes:
tests/test_measuring.py::test_bytes_count_while_somebody_holds_them

moemla/kernel_bench.py

bench-of-a-broken-kernel
A kernel that gives no numbers is timed as if it were right.
- equal = off <= tolerance * largest
+ equal = not off > tolerance * largest
tests/test_kernel_bench.py::test_a_kernel_that_gives_something_else_is_not_timed

bench-of-the-kernel-against-itself
With kernels enabled the plain row is the kernel too.
-     return with_kernels(program, False)
+     return with_kernels(program, kernels._enabled)
tests/test_kernel_bench.py::test_plain_is_plain_where_kernels_are_on

moemla/generation.py

written-text-trains-nothing
What is written cannot be trained on: it was made where torch keeps no record.
-     with torch.inference_mode(False):  # what is returned may be trained on
+     with torch.inference_mode(True):
tests/test_generation.py::test_what_is_written_can_be_trained_on

no-memory-is-another-model
Where memory runs out, the cache is said to be another model's.
-     except torch.OutOfMemoryError:
-         raise
tests/test_generation.py::test_no_memory_is_not_another_models_cache

one-seed-for-all
All rows of a batch draw the same random numbers.
- [int(seed) + row for row in range(len(prompts))]
+ [int(seed) for row in range(len(prompts))]
tests/test_generation.py::test_cached_equals_uncached_and_each_row_alone

generates-from-nan
Greedy generation takes the argmax of logits that are not numbers.
-             if not logits.isfinite().all():
+             if False:
tests/test_generation.py::test_logits_that_are_no_numbers_are_refused

cache-of-another-text
A cache that holds another prompt is taken for the beginning of this one.
- if kept[row][:length] != text[:length]:
+ if False:
tests/test_generation.py::test_a_cache_of_another_text_is_refused

cache-of-another-model
A cache that another model filled, or this one before it was trained on, is taken for its own.
- if not _filled_by(model, cache):
+ if False:
tests/test_generation.py::test_a_cache_of_another_model_is_refused

frozen-blocks-train
Generation leaves every module in the mode of the whole model: frozen blocks train again.
-             module.training = training
+             module.training = modes[0][1]
tests/test_evaluation.py::test_frozen_blocks_stay_in_eval_mode

compiles-for-every-end
A row that ends makes the batch smaller, and code is compiled for the new size.
- shrinks = not compiled or cache is None
+ shrinks = True
tests/test_generation.py::test_rows_that_end_make_no_new_graph

moemla/serving.py

a-slot-keeps-its-last-story
A story begins in a slot whose length is still that of the last one: it goes on from a text that it never saw.
-         lengths[last] = 0
+         pass
tests/test_serving.py::test_each_story_is_the_one_written_alone

rows-leave-from-the-front
Stories leave in the order of rows: who moves into a gap is passed over, or written twice.
- for place in reversed(range(n)):
+ for place in range(n):
tests/test_serving.py::test_each_story_is_the_one_written_alone

prompt-whole-and-its-end-again
A prompt is filled in with its last token, which the first step then computes once more.
- torch.tensor([story.text[:-1]], device=row.tokens.device)
+ torch.tensor([story.text], device=row.tokens.device)
tests/test_serving.py::test_each_story_is_the_one_written_alone

a-failed-draw-counts
A draw that fails leaves the generators where they were: the step is taken again, with other numbers.
-                 story.generator.set_state(state)
+                 pass
tests/test_serving.py::test_an_error_costs_no_story

a-slot-keeps-what-is-not-finite
A slot that fell free keeps numbers that are not finite, and spoils the sums of the story that comes.
-             self._wipe(place, held, lengths[place] + 1)  # one more: a step that failed wrote there
+             pass
tests/test_serving.py::test_a_story_that_is_not_finite_is_named_and_leaves_nothing_behind

a-broken-prompt-stays-behind
A prompt that is broken off leaves its numbers in the slot, where the next story has none of its own.
-                     self._wipe(place, 0, len(story.text))
+                     pass
tests/test_serving.py::test_a_prompt_that_was_broken_off_leaves_nothing_behind

experts-read-as-if-all-were-different
Two stories are taken to choose different experts, always.
-     return n_experts * (1 - (1 - top_k / n_experts) ** rows) if n_experts else 0.0
+     return float(min(n_experts, top_k * rows))
tests/test_serving.py::test_experts_read_is_the_mean_of_even_choices

moemla/interop.py

heads-not-woven
On the way to `transformers` the keys of all heads come first, then all values, instead of head by head.
- rearrange(torch.cat((k_up, v_up), dim=1), "h k r -> (h k) r")
+ torch.cat((k_up.flatten(0, 1), v_up.flatten(0, 1)))
tests/test_interop.py::test_logits

balancing-bias-left-behind
The exported router has a bias of zero, and chooses other experts.
- "mlp.gate.e_score_correction_bias", SAME)
+ "mlp.gate.e_score_correction_bias", (lambda config, bias: (0 * bias,),) * 2)
tests/test_interop.py::test_logits

rotation-rounded
A bfloat16 model of `transformers` is made in float32 and moved, which rounds its rotary frequencies.
- from_config(made, dtype=weight.dtype).to(weight.device)
+ from_config(made).to(weight.device, weight.dtype)
tests/test_interop.py::test_bfloat16_keeps_router_bias_and_rotation_wide

exports-nan
Weights that are not numbers are given away.
-         if not weight.isfinite().all():
+         if False:
tests/test_interop.py::test_weights_that_are_no_numbers_are_not_exported

export-pads-on-the-right
The exported tokenizer fills a batch behind the prompts.
- padding_side="left"
+ padding_side="right"
tests/test_interop.py::test_a_batch_of_unequal_prompts_and_a_pipeline_begin_as_training_did

export-without-start-token
The exported tokenizer puts no start token before a text, as training did.
- add_bos_token=True
+ add_bos_token=False
tests/test_interop.py::test_a_batch_of_unequal_prompts_and_a_pipeline_begin_as_training_did

export-turns-halves
The rows of an export stay in halves while its config says that neighbours turn.
- if c.rope_layout == "halves" else 0
+ if False else 0
tests/test_interop.py::test_the_exported_form_is_the_same_function

moemla/parallel.py

experts-summed-over-ranks
Experts over ranks hear of their neighbours' tokens and are moved as often: their gradients are twice too long.
-     neighbours = dict(group=mesh.get_group("expert"), share=1 / world.expert_parallel)
+     neighbours = dict(group=mesh.get_group("expert"), share=1.0)
tests/test_parallel.py::test_two_ranks_learn_what_one_learns[double-1e-09-experts]

each-rank-clips-by-its-part
With experts over ranks a rank takes the norm of what it holds for the norm of all gradients.
- world.sum(norms[1].square())
+ norms[1].square()
tests/test_parallel.py::test_two_ranks_learn_what_one_learns[double-1e-09-experts-fsdp]

copies-of-experts-drift
Ranks that hold the same experts do not tell each other of their gradients.
-     if mesh.size() > 1:
+     if mesh.size() > 9:
tests/test_parallel.py::test_what_two_ranks_saved_four_go_on_with

moemla/optim.py

matrices-by-prefix
Of a wrapped model no matrix is found by its name, and AdamW trains what Muon should.
- ("blocks" in path or
+ (name.startswith("blocks.") or
tests/test_optim.py::test_wrapping_a_model_changes_no_group

moemla/results.py

renamed-results
A result is what its path says, whatever stands inside.
- _require(data["name"] == name, source
+ _require(True, source
tests/test_results.py -k 'not_what_it_says'

moemla/schedules.py

wsd-begins-a-step-late
The fall of the rate begins a step late and never ends.
- begin = max(warmup, steps - round(settings.decay * steps))
+ begin = max(warmup, steps - round(settings.decay * steps)) + 1
tests/test_schedules.py::test_wsd_stays_and_falls_in_a_line_over_the_last_share

moemla/shards.py

same-rows-for-every-rank
Every rank trains on the same rows.
- np.arange(world.rank * rows, (world.rank + 1) * rows)
+ np.arange(rows)
tests/test_shards.py::test_ranks_share_the_rows_of_one_batch

flipped-bit-passes
A bit that flipped on the disk is trained on: the tokens' checksum is not compared.
- if of_tokens not in (None, actual):
+ if False:
tests/test_shards.py::test_every_bit_of_a_shard_is_checked

ids-beyond-vocabulary-pass
Token ids beyond the vocabulary reach the embedding.
- >= self.vocab_size:
+ > 65_535:
              raise self._damaged(f"token
tests/test_shards.py::test_a_shard_of_the_version_before_is_read_and_its_ids_looked_at

moemla/tokenizer.py

dropout-in-the-tokenizer
A tokenizer that drops merges at random has the hash of the one that does not, and gives a text other ids.
- ("dropout", "continuing_subword_prefix",
+ ("continuing_subword_prefix",
tests/test_tokenizer.py::test_a_file_that_would_encode_otherwise_is_refused

long-runs-learnt-whole
Learning from one unbroken run takes the square of its length.
- pre_tokenizers.Sequence([words, parts])
+ words
tests/test_tokenizer.py::test_one_long_run_is_learnt_from_in_parts

long-stories-encoded-whole
A long story goes through the library in one piece and takes a hundred times its size in memory.
- while end := _END_OF_WORD.search(text, start + PIECE):
+ while end := None:
tests/test_tokenizer.py::test_a_long_story_takes_little_memory

moemla/training.py

rank-0-blames-its-own
Whichever rank holds the gradient that is no number, rank 0 names its own largest.
- if speaks in (None, world.rank):
+ if world.main:
tests/test_parallel.py::test_the_rank_with_the_gradient_to_blame_speaks

loss-of-one-rank
The log of a run over several ranks holds the loss of the first one alone.
-     total = world.sum(total) / world.size
tests/test_ranks.py -k 'run_of_one'

bias-per-micro-batch
The bias moves after each micro-batch instead of once a step.
          loss.backward()
+         balancer.step()
tests/test_training.py::test_micro_batches_change_nothing_but_rounding

switch-loss-of-each-part
Each micro-batch is balanced alone: the Switch loss takes the loads of the part instead of the step's.
- switch_loss(routing, counts=counts[layer])
+ switch_loss(routing)
tests/test_training.py::test_a_step_in_parts_has_the_gradients_of_the_whole

mean-of-means
Micro-batches weigh alike, however few targets one of them has.
- loss = loss / (sum(scored) / here) if here else loss * 0
+ loss = loss / len(rows)
tests/test_training.py::test_parts_with_unequal_numbers_of_targets_are_weighed_by_them

two-trainings-one-folder
Two processes train in one folder and delete each other's checkpoints.
-                 if world.main:
-                     held.enter_context(claimed(out, "moemla train"))
+                 held.enter_context(nullcontext())
tests/test_training.py::test_a_second_process_is_told_at_once_and_a_killed_one_is_in_nobodys_way

written-before-it-works
A start that fails has already written the run that is then in the way.
              run.check(resume)
+             run.begin()
tests/test_training.py::test_a_first_step_that_fails_leaves_no_run

overflow-moves-the-bias
A step that overflows is left out, and its loads move the balancing bias with those of the next one.
-         balancer.counts = None
-         for router in balancer.routers:
-             router.forget()
+         pass
tests/test_precision.py::test_a_step_that_overflows_moves_nothing

loss-of-one-rank-decides
The loss of one rank is no number: that rank gives up, and the others take it for an overflow.
-     total = world.sum(total) / world.size
      numbers = torch.stack((total, norm)).isfinite().tolist()
+     total = world.sum(total) / world.size
tests/test_precision.py::test_two_ranks_decide_alike

no-patience-after-a-resume
A run that goes on has forgotten how many scores were no better, and ends late.
-                 session.save(step + 1, **validation.state())
+                 session.save(step + 1)
tests/test_validation.py::test_a_resumed_run_has_lost_no_patience

recomputed-under-another-dropout
The repeated pass draws other dropout than the first, and the gradient is that of neither.
- partial(checkpoint, block.forward, use_reentrant=False)
+ partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
tests/test_recompute.py::test_recomputed_numbers_are_the_same_bit_by_bit

blocks-stay-recomputed
A model that was trained with recomputed blocks keeps them: it cannot be pickled and is slower for ever.
-             del block.forward  # the class has one
+             pass
tests/test_recompute.py::test_the_model_is_as_it_was_afterwards

moemla/session.py

scale-not-in-the-checkpoint
A run in float16 that goes on begins again with the first loss scale.
- LossScaler(**self.state["scaler"] or {})
+ LossScaler()
tests/test_precision.py::test_resume_is_exact

diverged-weights-are-saved
What diverged in the step's update is written as a checkpoint that nobody can load.
-             if broken := self._no_number():
-                 raise self._diverged(f"step
+             if False:
+                 broken = ""; raise self._diverged(f"step
tests/test_training.py::test_weights_that_are_no_numbers_are_never_saved

init-of-other-words
A run begins with the weights of a model that read other tokens under the same numbers.
-     if words.hash != tokenizer.hash:
+     if words.vocab_size != tokenizer.vocab_size:
tests/test_session.py::test_another_tokenizer_or_none_is_refused

moemla/validation.py

whole-after-a-score
FSDP2's outermost module stays whole after a score, and no checkpoint can be written behind it.
-                 model.reshard()
+                 pass
tests/test_parallel.py::test_a_checkpoint_behind_a_score_that_is_no_better

validation-leaves-eval
After a validation the model trains in eval mode: no dropout, no counts.
-             model.train()
+             pass
tests/test_validation.py::test_validation_changes_nothing_but_the_log

moemla/paper/claims.py

interval-unread
A measured claim at the paper's scale is contradicted by a mean whose interval agrees.
- for span in ((low, high), (low, low), (high, high))
+ for span in ((value, value),)
tests/paper/test_claims.py::test_an_interval_contradicts_where_none_of_it_agrees

moemla/kernels/decode.py

kernel-merge-without-shares
The pieces of a long cache are joined as if each had the same sum of exponentials.
- shrink, share = tl.exp(highest - safe), tl.exp(log - safe)
+ shrink, share = tl.exp(highest - safe), 1.0
tests/kernels/test_decode.py -k 'interpreted and pieces'

kernel-softmax-without-shrinking
The online softmax finds a larger score and does not shrink what it has summed up so far.
-     context = context * shrink[:, None]
tests/kernels/test_decode.py -k 'interpreted and pieces'

kernel-lengths-ignored
A short row of a batch sees the slots of the longest one.
-         last = tl.minimum(last, tl.load(lengths + row).to(tl.int32))
+         last = last
      head = tl.program_id(2)
tests/kernels/test_decode.py -k 'interpreted and unequal'

kernel-heads-of-the-first-program
Where heads are more than one program takes, each program works on the first of them.
-     head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
+     head = tl.arange(0, BLOCK_H)
tests/kernels/test_decode.py -k 'interpreted and joint and programs'

moemla/kernels/tiling.py

tile-larger-than-the-chip
The joint decode takes its tile whether or not the GPU's shared memory holds it.
-         if held <= room(tensor):
+         if held:
tests/kernels/test_tiling.py -k of_latents_fits

one-program-too-many
A long cache is cut into one piece more for each row than a GPU runs at once: some wait for a second round.
- wanted = max(1, min(programs // rows, triton.cdiv(n_slots, 128)))
+ wanted = max(1, min(triton.cdiv(programs, rows), triton.cdiv(n_slots, 128)))
tests/kernels/test_tiling.py -k waits_for_another

moemla/kernels/dispatch.py

kernel-unstable-dispatch
Slots of one block are all put at the expert's first row: they overwrite each other.
- row = tl.sum(chosen * (before + start[None, :]), axis=1)
+ row = tl.sum(chosen * start[None, :], axis=1)
tests/kernels/test_experts.py -k 'interpreted and dispatch'

moemla/kernels/experts.py

kernel-rows-of-the-next-expert
The last tile of an expert is not masked and multiplies rows of the next one.
-     real = row < tl.load(offsets + expert + 1)
+     real = row < tl.load(offsets + n_experts)
      slot = tl.load(order + row, mask=real, other=0)
      source = (slot // TOP_K if GATHER else row).to(tl.int64)
      col =
tests/kernels/test_experts.py::test_programs_may_run_in_any_order

kernel-wrong-stride
Tokens are read with the stride of the hidden layer instead of their own.
- left = tl.load(x + token[:, None] * x_row + d[None, :]
+ left = tl.load(x + token[:, None] * width + d[None, :]
tests/kernels/test_experts.py -k 'interpreted and narrow'

kernel-gate-twice
The gate is applied to the hidden layer, and once more to the output.
          out = tl.dot(hidden, right, input_precision="ieee")
+         out *= tl.load(gate + slot, mask=real, other=0.0).to(tl.float32)[:, None]
tests/kernels/test_experts.py -k 'interpreted and narrow'

kernel-gate-missing-backward
The gradient of the hidden layer is not weighed by the gate.
-     u *= weight
tests/kernels/test_experts.py -k 'interpreted and equals'

moemla/kernels/rope.py

kernel-turned-the-same-way-back
The gradient of a rotation is turned forwards instead of back.
- interleaved, not inverse), *[None] * 6
+ interleaved, inverse), *[None] * 6
tests/kernels/test_rope.py -k interpreted

moemla/kernels/routing.py

kernel-padding-lanes-chosen
The router's kernel forgets that 62 experts are not 64 lanes: two lanes of padding can be chosen.
- left = tl.where(expert, biased, -float("inf"))
+ left = biased
tests/kernels/test_routing.py::test_lanes_of_padding_are_never_chosen -k interpreted
"""
