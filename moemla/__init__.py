"""moemla: mixture of experts, latent attention and rotary positions for small language models; the library of a book.

Names are loaded when they are first used, so that `import moemla` costs little more than `import torch`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what an editor or a type checker sees; the names of _HOME and _MODULES
    from moemla import attention as attention
    from moemla import balancing as balancing
    from moemla import bench as bench
    from moemla import cache as cache
    from moemla import checkpoint as checkpoint
    from moemla import complexity as complexity
    from moemla import config as config
    from moemla import data as data
    from moemla import devices as devices
    from moemla import evaluation as evaluation
    from moemla import experiments as experiments
    from moemla import experts as experts
    from moemla import feedforward as feedforward
    from moemla import generation as generation
    from moemla import interop as interop
    from moemla import kernels as kernels
    from moemla import latent_attention as latent_attention
    from moemla import linear as linear
    from moemla import losses as losses
    from moemla import measuring as measuring
    from moemla import model as model
    from moemla import moe as moe
    from moemla import ngrams as ngrams
    from moemla import optim as optim
    from moemla import rope as rope
    from moemla import routing as routing
    from moemla import stories as stories
    from moemla import tokenizer as tokenizer
    from moemla import training as training
    from moemla.attention import MultiHeadAttention as MultiHeadAttention
    from moemla.balancing import Balancer as Balancer
    from moemla.cache import (
        HybridCache as HybridCache,
    )
    from moemla.cache import (
        JointLatentCache as JointLatentCache,
    )
    from moemla.cache import (
        KVCache as KVCache,
    )
    from moemla.cache import (
        LatentCache as LatentCache,
    )
    from moemla.checkpoint import load as load
    from moemla.config import ModelConfig as ModelConfig
    from moemla.feedforward import FeedForward as FeedForward
    from moemla.generation import generate as generate
    from moemla.latent_attention import (
        DecoupledLatentAttention as DecoupledLatentAttention,
    )
    from moemla.latent_attention import (
        MultiHeadLatentAttention as MultiHeadLatentAttention,
    )
    from moemla.model import Block as Block
    from moemla.model import LanguageModel as LanguageModel
    from moemla.moe import MixtureOfExperts as MixtureOfExperts
    from moemla.rope import RotaryEmbedding as RotaryEmbedding
    from moemla.routing import Router as Router
    from moemla.tokenizer import Tokenizer as Tokenizer
    from moemla.training import TrainConfig as TrainConfig
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
    "Tokenizer": "tokenizer",
    "load": "checkpoint",
    "TrainConfig": "training",
    "train": "training",
}
_MODULES = (
    *(
        "attention",
        "balancing",
        "bench",
        "cache",
        "checkpoint",
        "complexity",
        "config",
        "data",
        "devices",
        "evaluation",
        "experiments",
        "experts",
    ),
    *(
        "feedforward",
        "generation",
        "interop",
        "kernels",
        "latent_attention",
        "linear",
        "losses",
        "measuring",
        "model",
        "moe",
        "ngrams",
        "optim",
        "rope",
        "routing",
        "stories",
    ),
    *("tokenizer", "training"),
)

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
