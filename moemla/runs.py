"""A run's folder: what the run is, and the rows of its log. Built in chapter 13."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from moemla import complexity
from moemla.balancing import Balancer, coefficient_of_variation, max_violation, noise_floor
from moemla.config import VERSION, ModelConfig, TrainConfig, architecture, stored_fields
from moemla.errors import MoemlaError
from moemla.files import read_json, replacing, why, write_json
from moemla.precision import LossScaler


@dataclass
class Progress:
    """One row of the log. Built in chapter 5.

    `loss` is the mean nats per token since the last row; `load_cv` the coefficient of variation of the experts' load
    over the last `load_window` steps, mean over layers, and `load_cv_floor` what uniform random routing would show
    there; the two lists are of the same steps, from the first layer with experts on, `max_violation` being the largest
    load over the mean, minus one. `utilisation` is the model's FLOPs (3 x forward) over this machine's own
    matrix-multiply rate; `valid_loss` the nats per token on the validation windows, in the rows of steps that were
    validated, None where they are no number. With precision="fp16" there are `loss_scale` and `skipped`, the steps that
    overflowed; `grad_norm` is None where the row's own did.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    seconds: float
    tokens_per_second: float
    utilisation: float
    seconds_left: float
    grad_norm: float | None
    load_cv: float | None = None
    load_cv_floor: float | None = None
    load_window: int | None = None  # steps
    valid_loss: float | None = None
    loss_scale: float | None = None
    skipped: int | None = None  # steps so far
    load_cv_by_layer: list[float] | None = None
    max_violation_by_layer: list[float] | None = None


class Run:
    """What a run is, and the files that say so."""

    def __init__(
        self,
        data: Path,
        out: Path,
        config: ModelConfig,
        settings: TrainConfig,
        tokenizer,
        facts: dict,
        init: str | os.PathLike | None = None,
        computed: dict[str, bool] | None = None,
    ):
        self.out, self.config, self.settings, self.tokenizer = out, config, settings, tokenizer
        if "unfinished" in facts:
            raise MoemlaError(f"{data} was not finished: run `moemla prepare` again")
        try:
            run = dict(model=config.to_dict(), train=asdict(settings), data=facts["hash"], splits=facts["splits"])
        except KeyError as error:
            raise MoemlaError(f"{data}/data.json is damaged ({error} is missing): prepare again") from error
        run |= dict(tokenizer=tokenizer.hash, init=None if init is None else _places(Path(init), out))
        self.facts = dict(version=VERSION) | run | _places(data, out) | dict(computed=computed)
        self.saved = False  # whether there is a checkpoint to go on from

    def check(self, resume: bool) -> None:
        """MoemlaError if another run lies in the folder, or this one and it is not to go on."""
        out = self.out
        self.saved = any((out / "checkpoints").glob("step-*"))
        if not ((out / "train.json").exists() or self.saved):
            return
        if not resume:
            raise MoemlaError(f"{out} already holds a run: continue it with --resume, or name another folder")
        try:
            before = read_json(out / "train.json")
            version = before.get("version", 0)
            before = stored_fields("a run", self.facts, before)
            for part, name in (("model", "ModelConfig"), ("train", "TrainConfig")):
                if isinstance(before.get(part), dict):
                    before[part] = stored_fields(name, self.facts[part], before[part], version)
        except ValueError as error:
            raise MoemlaError(f"{out / 'train.json'}: {error}") from error
        for part in ("model", "train", "data", "tokenizer"):
            was, now = before.get(part), self.facts[part]
            if part == "model" and isinstance(was, dict):
                was, now = architecture(was), architecture(now)
            if was != now:
                names = sorted(was.keys() | now.keys()) if isinstance(was, dict) and isinstance(now, dict) else ()
                changed = ", ".join(name for name in names if was.get(name) != now.get(name)) or part
                raise MoemlaError(
                    f"{out} holds a run with other settings ({changed}): repeat them, or name another folder"
                )
        self._check_init(before.get("init"))

    def _check_init(self, before: dict | None) -> None:
        """MoemlaError unless the run began with the weights that are named now; a checkpoint needs no name of them."""
        now = self.facts["init"]
        if (now is None and self.saved) or now == before:
            return
        same = now and before and any(now[name] == before.get(name) for name in ("folder", "absolute_folder"))
        if not same:
            began = f"began with the weights of {before['absolute_folder']}" if before else "began without init"
            raise MoemlaError(f"{self.out} holds a run that {began}: repeat that, or name another folder")
        self.facts["init"] = before

    def begins_with(self, sha256: str) -> None:
        """Notes the weights that the run begins with. MoemlaError if it began with others when it was started first."""
        before = self.facts["init"].get("sha256", sha256)
        if before != sha256:
            place = self.facts["init"]["absolute_folder"]
            raise MoemlaError(
                f"{place} has other weights now than when {self.out} began with them: name another folder"
            )
        self.facts["init"]["sha256"] = sha256

    def begin(self) -> None:
        """Writes them where they are not there."""
        if not (self.out / "train.json").exists():
            self.tokenizer.save(self.out / "tokenizer.json")
            write_json(self.out / "config.json", dict(version=VERSION) | self.config.to_dict())
            write_json(self.out / "train.json", self.facts)


def _places(folder: Path, run: Path) -> dict[str, str]:
    """Where a folder lies: beside the run, since both may be moved together, and at this time."""
    absolute = os.fspath(folder.resolve())
    try:
        return dict(folder=os.path.relpath(absolute, run.resolve()), absolute_folder=absolute)
    except ValueError:  # another drive
        return dict(folder=absolute, absolute_folder=absolute)


class Log:
    """metrics.jsonl, one row each `log_every` steps; on a resumed run, rows past the checkpoint are dropped first.

    `flops_per_second` is what this machine's matrix products reach (all ranks' together): a row's utilisation is a
    share of it.
    """

    def __init__(
        self,
        path: Path,
        state: dict,
        config: ModelConfig,
        train_config: TrainConfig,
        device: torch.device,
        flops_per_second: float,
        on_progress: Callable[[Progress], None] | None = None,
    ):
        self.path, self.config, self.settings, self.on_progress = path, config, train_config, on_progress
        self.before, self.first = state["seconds"], state["step"]
        flops = complexity.training_flops_per_token(config, seq_len=train_config.seq_len)
        self.peak_tokens = flops_per_second / flops  # tokens a second if there were nothing but products
        self.losses = [torch.tensor(loss, device=device) for loss in state["losses"]]
        counts = (torch.tensor(counts, device=device) for counts in state["window"])
        self.window = deque(counts, maxlen=train_config.load_window)
        self.kept = [row for row in _rows(path) if row["step"] <= self.first] if path.exists() else []
        self.file = None
        self.begin = time.perf_counter()

    def begin_writing(self) -> None:
        """Opens the file, with the rows up to the checkpoint."""
        with replacing(self.path) as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in self.kept).encode())
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed in __exit__)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with suppress(OSError, AttributeError):  # each row was flushed when it was written; or it never was opened
            self.file.close()

    @property
    def seconds(self) -> float:
        """Of the whole run, those before a resume included."""
        return self.before + time.perf_counter() - self.begin

    def state(self) -> dict:
        """What the next row needs, for a checkpoint between two rows."""
        return dict(
            seconds=self.seconds,
            losses=[loss.item() for loss in self.losses],
            window=[counts.tolist() for counts in self.window],
        )

    def add(
        self,
        step: int,
        loss: Tensor,
        norm: Tensor,
        lr: float,
        balancer: Balancer,
        valid_loss: float | None = None,
        scaler: LossScaler | None = None,
        last: bool = False,
    ) -> None:
        """Notes a finished step; writes a row where one is due, unless `begin_writing` is left to another rank."""
        self.losses.append(loss)
        if balancer.counts is not None:
            self.window.append(torch.stack(balancer.counts))
        if step % self.settings.log_every and not last and valid_loss is None:
            return
        losses, self.losses = self.losses, []
        if self.file is None:
            return
        mean = torch.stack(losses).mean().item()
        elapsed, each = time.perf_counter() - self.begin, self.settings.batch_size * self.settings.seq_len
        rate = (step - self.first) * each / elapsed
        row = Progress(
            step=step,
            tokens=step * each,
            loss=mean,
            lr=lr,
            seconds=self.seconds,
            tokens_per_second=rate,
            utilisation=rate / self.peak_tokens,
            seconds_left=0.0 if last else (self.settings.steps - step) * each / rate,
            grad_norm=float(norm) if norm.isfinite() else None,
            valid_loss=valid_loss if valid_loss is None or math.isfinite(valid_loss) else None,
        )
        if scaler is not None:
            row.loss_scale, row.skipped = scaler.scale, scaler.skipped
        if self.window:
            counts = torch.stack(tuple(self.window)).sum(0)
            row.load_cv_by_layer = [coefficient_of_variation(layer) for layer in counts]
            row.max_violation_by_layer = [max_violation(layer) for layer in counts]
            row.load_cv = sum(row.load_cv_by_layer) / len(counts)
            row.load_cv_floor = noise_floor(self.config.n_experts, self.config.top_k, len(self.window) * each)
            row.load_window = len(self.window)
        try:
            self.file.write(json.dumps(asdict(row), allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise MoemlaError(f"cannot write {self.path}: {why(error)}") from error
        if self.on_progress is not None:
            self.on_progress(row)


def _rows(path: Path) -> list[dict]:
    """The rows, without the last one if a killed process left it without its end."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise MoemlaError(f"{path} cannot be read: {error}") from error


def read_metrics(run: str | os.PathLike) -> list[Progress]:
    """The rows of a run's metrics.jsonl. MoemlaError where there is none."""
    known = {field.name for field in fields(Progress)}
    rows = _rows(Path(run) / "metrics.jsonl")
    return [Progress(**{key: value for key, value in row.items() if key in known}) for row in rows]


def data_folder(run: str | os.PathLike) -> Path:
    """Where the prepared data of a run lies now: by its place beside the run, else by its place at the time.

    The folder's data.json must hold the hash that the run was trained on; MoemlaError where none does.
    """
    run = Path(run)
    facts = read_json(run / "train.json")
    folder = str(facts.get("folder", ""))
    if facts.get("version", 0):
        candidates = [run / folder, Path(str(facts.get("absolute_folder", folder)))]
    else:  # relative to where the training was started
        candidates = [Path(folder), *(parent / folder for parent in run.resolve().parents)]
    for candidate in candidates:
        record = candidate / "data.json"
        if record.is_file() and read_json(record).get("hash") == facts.get("data"):
            return candidate
    raise MoemlaError(f"the data of {run} is not in {candidates[0]} (any more): name stories to score with --text FILE")
