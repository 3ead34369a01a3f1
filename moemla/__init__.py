"""moemla: mixture of experts, latent attention and rotary positions for small language models; the library of a book.

Names are loaded when they are first used, so that `import moemla` costs little more than `import torch`.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what an editor or a type checker sees; the names of _HOME and _MODULES
    from moemla import (
        attention as attention,
        balancing as balancing,
        bench as bench,
        cache as cache,
        cells as cells,
        checkpoint as checkpoint,
        checks as checks,
        cli as cli,
        commands as commands,
        complexity as complexity,
        config as config,
        data as data,
        devices as devices,
        distributed as distributed,
        errors as errors,
        evaluation as evaluation,
        experiments as experiments,
        experts as experts,
        feedforward as feedforward,
        files as files,
        footprint as footprint,
        generation as generation,
        interop as interop,
        judge as judge,
        kernel_bench as kernel_bench,
        kernels as kernels,
        latent_attention as latent_attention,
        lessons as lessons,
        linear as linear,
        loggers as loggers,
        losses as losses,
        measuring as measuring,
        model as model,
        moe as moe,
        ngrams as ngrams,
        optim as optim,
        paper as paper,
        parallel as parallel,
        planning as planning,
        plots as plots,
        precision as precision,
        quality as quality,
        results as results,
        rope as rope,
        routing as routing,
        runs as runs,
        schedules as schedules,
        serving as serving,
        serving_bench as serving_bench,
        session as session,
        sharded as sharded,
        shards as shards,
        statistics as statistics,
        stories as stories,
        text as text,
        tokenizer as tokenizer,
        training as training,
        validation as validation,
    )
    from moemla.attention import MultiHeadAttention as MultiHeadAttention
    from moemla.balancing import Balancer as Balancer
    from moemla.cache import (
        HybridCache as HybridCache,
        JointLatentCache as JointLatentCache,
        KVCache as KVCache,
        LatentCache as LatentCache,
    )
    from moemla.checkpoint import load as load
    from moemla.config import ModelConfig as ModelConfig, TrainConfig as TrainConfig
    from moemla.feedforward import FeedForward as FeedForward
    from moemla.generation import generate as generate
    from moemla.latent_attention import (
        DecoupledLatentAttention as DecoupledLatentAttention,
        MultiHeadLatentAttention as MultiHeadLatentAttention,
    )
    from moemla.model import Block as Block, LanguageModel as LanguageModel
    from moemla.moe import MixtureOfExperts as MixtureOfExperts
    from moemla.rope import RotaryEmbedding as RotaryEmbedding
    from moemla.routing import Router as Router
    from moemla.serving import Server as Server
    from moemla.tokenizer import Tokenizer as Tokenizer
    from moemla.training import train as train

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "config",
    "RotaryEmbedding": "rope",
    "KVCache": "cache",
    "LatentCache": "cache",
    "HybridCache": "cache",
    "JointLatentCache": "cache",
    "FeedForward": "feedforward",
    "Router": "routing",
    "Balancer": "balancing",
    "MultiHeadAttention": "attention",
    "MultiHeadLatentAttention": "latent_attention",
    "DecoupledLatentAttention": "latent_attention",
    "MixtureOfExperts": "moe",
    "Block": "model",
    "LanguageModel": "model",
    "generate": "generation",
    "Server": "serving",
    "Tokenizer": "tokenizer",
    "load": "checkpoint",
    "TrainConfig": "config",
    "train": "training",
}
_MODULES = tuple(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))

__all__ = ["__version__", *_HOME]


if not TYPE_CHECKING:  # a type checker would take every mistake for a name

    def __getattr__(name: str):
        if name in _HOME:
            return getattr(import_module(f"moemla.{_HOME[name]}"), name)
        if name in _MODULES:
            return import_module(f"moemla.{name}")
        raise AttributeError(f"module 'moemla' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOME, *_MODULES})
