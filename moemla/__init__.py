"""moemla: mixture of experts, latent attention and rotary positions for small language models, built step by step in
the book.

Names are loaded when they are first used, so that `import moemla` costs little more than `import torch`.
"""

from importlib import import_module

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
        "checks",
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


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"moemla.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"moemla.{name}")
    raise AttributeError(f"module 'moemla' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOME, *_MODULES})
