"""The commands, one a module: a dataclass whose fields are the options and whose call does the work."""

from moemla.commands.bench import Bench
from moemla.commands.check import Check
from moemla.commands.claims import Claims
from moemla.commands.evaluate import Evaluate
from moemla.commands.experiment import Experiment
from moemla.commands.export import Export
from moemla.commands.generate import Generate
from moemla.commands.judge import Judge
from moemla.commands.plan import Plan
from moemla.commands.plot import Plot
from moemla.commands.prepare import Prepare
from moemla.commands.train import Train

COMMANDS = {
    "prepare": Prepare,
    "plan": Plan,
    "train": Train,
    "plot": Plot,
    "evaluate": Evaluate,
    "generate": Generate,
    "judge": Judge,
    "export": Export,
    "experiment": Experiment,
    "bench": Bench,
    "check": Check,
    "claims": Claims,
}
