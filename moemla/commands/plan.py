"""`moemla plan`: memory, time and cost before a run. Built in chapter 13."""

from dataclasses import asdict, dataclass
from typing import Literal

from moemla import planning
from moemla.commands.terminal import Flag, Flat, print_json
from moemla.config import MATCHES, SIZES, VARIANTS, ModelConfig, setting
from moemla.planning import GB, ROOM


@dataclass
class Plan:
    """Says what a training will hold, take and cost, before it runs; the defaults are the paper's recipe.

    Arithmetic: how much of a card's peak is reached (--mfu) is an assumption, and nothing was measured on the card.
    """

    job: Flag[Flat[planning.Job]]
    size: Literal[tuple(SIZES)] = "M"
    variant: Literal[VARIANTS] = "moe-mla-rope"
    matched: Literal[MATCHES] = "parameters"
    vocab_size: int = 50_257
    dropout: float = 0.1
    set: tuple[str, ...] = ()
    """Any field of the model's config as FIELD=VALUE: --set n_experts=14 top_k=2."""
    json: Flag[bool] = False
    """Print the plan as one JSON object."""

    def __call__(self) -> None:
        length = max(ModelConfig.max_seq_len, self.job.seq_len)
        changes = dict(vocab_size=self.vocab_size, dropout=self.dropout, max_seq_len=length)
        changes |= dict(setting(text) for text in self.set)
        config = ModelConfig.preset(self.size, self.variant, self.matched, **changes)
        answer = planning.plan(config, self.job)
        if self.json:
            print_json(dict(model=config.to_dict(), job=asdict(self.job), plan=asdict(answer)))
            return
        print(f"{self.size} {self.variant}, matched by {self.matched}")
        _show(answer, self.job)


def _show(answer: planning.Plan, job: planning.Job) -> None:
    """Prints a plan: parameters, one GPU's memory by part, hours and cost."""
    total, active, embedding = (answer.parameters[name] for name in ("total", "active", "embedding"))
    print(f"  {total:,} parameters, {active:,} of them active for a token, {embedding:,} in the embedding")
    print(f"  {answer.flops_per_token:.3g} FLOPs to train on a token, {answer.flops:.3g} in {job.steps:,} steps")
    where = f"{job.gpus} x {job.gpu}" + (f" under {job.parallel}" if job.gpus > 1 else "")
    print(f"\n{where}, {job.precision}, {job.optimizer}, {job.step.rows} x {job.seq_len} tokens at once on each")
    print(f"memory of one, GB (1e9 bytes), when it holds most: {answer.moment}")
    for name, size in answer.memory.items():
        print(f"  {name:14}{size / GB:8.2f}")
    said = "fits" if answer.fits else "does not fit"
    print(f"  {'sum':14}{answer.peak / GB:8.2f}  of {answer.room / GB:.1f}, {ROOM:.0%} of the card: {said}")
    if answer.change:
        print(f"  {answer.change}")
    # karpathy/nanochat, dev/LOG.md, 19 February 2026: a model of 18 layers on H100
    print(f"\nassumed, not measured: {job.mfu:.0%} of {answer.peak_flops / 1e12:,.4g} TFLOP/s is reached (--mfu)")
    print("(published elsewhere: nanochat's 46% for a dense model, 35% with experts)")
    print(f"  {answer.tokens_per_second:,.0f} tokens/s  {answer.hours:.2f} hours  {answer.gpu_hours:.2f} GPU hours")
    if answer.cost is not None:
        print(f"  cost {answer.cost:,.2f} at {job.price:,.2f} for a GPU and an hour")
    if answer.computed > 1.005:
        reasons = ["every token passes every expert (back end masked)"] if answer.backend == "masked" else []
        reasons += ["blocks run forward twice (--recompute)"] if job.recompute else []
        print(f"  run are {answer.computed:.2f} times these FLOPs: {' and '.join(reasons)};")
        print(f"  if they, too, go at that rate: {answer.hours * answer.computed:.2f} hours")
