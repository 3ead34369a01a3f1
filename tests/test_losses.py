"""The chunked cross-entropy against torch's own, in value and in gradient."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from moemla.losses import linear_cross_entropy
from tests.helpers import close


def example(n=11, d=5, v=13, ignored=(), dtype=torch.float64):
    x = torch.randn(n, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, v, (n,))
    for place, row in enumerate(ignored):
        targets[row] = (-1, -100, -7)[place % 3]
    return x, weight, targets


def plain(x, weight, targets):
    kept = targets >= 0
    if not kept.any():
        return (x.sum() + weight.sum()) * 0
    return F.cross_entropy((x @ weight.T)[kept], targets[kept])


@pytest.mark.parametrize("ignored", [(), (0,), (2, 3, 10), range(11)])
@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 12, 1024])
def test_equals_cross_entropy(chunk, ignored):
    x, weight, targets = example(ignored=ignored)
    loss = linear_cross_entropy(x, weight, targets, chunk)
    wanted = plain(x, weight, targets)
    assert loss.dtype == torch.float64
    close(loss, wanted, 1e-14)
    ours = torch.autograd.grad(loss * 3, (x, weight))
    theirs = torch.autograd.grad(wanted * 3, (x, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(a).all()
        close(a, b, 1e-13)


@pytest.mark.parametrize("v", [1, 15, 16, 17, 40])
def test_any_vocabulary(v):
    """Rows of logits are padded to whole cache lines: whatever stands there counts for nothing."""
    x, weight, targets = example(v=v, ignored=(3,))
    ours, theirs = linear_cross_entropy(x, weight, targets, 4), plain(x, weight, targets)
    close(ours, theirs, 1e-14)
    pairs = zip(torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(theirs, (x, weight)), strict=True)
    for a, b in pairs:
        close(a, b, 1e-13)


@pytest.mark.parametrize("target", [17, 20, 31, 40])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    """Also where the padding of a row would have had a place for it."""
    x, weight, targets = example(v=17, dtype=torch.float32)
    targets[3] = target
    with pytest.raises(ValueError, match=f"targets={target}: must be below the vocabulary's size, 17"):
        linear_cross_entropy(x, weight, targets)


def test_rows_and_targets_must_match():
    x, weight, targets = example()
    for wrong in (targets.repeat(2), targets[:5]):
        with pytest.raises(ValueError, match="one for each of 11 rows"):
            inspect.unwrap(linear_cross_entropy)(x, weight, wrong)  # as users have it, without the tests' type checks
    with pytest.raises(ValueError, match="chunk=0"):
        linear_cross_entropy(x, weight, targets, 0)


def test_what_stands_in_an_ignored_row_is_not_seen():
    x, weight, targets = example(ignored=(4,))
    with torch.no_grad():
        wanted = linear_cross_entropy(x, weight, targets)
        x[4] = float("nan")
        assert torch.equal(linear_cross_entropy(x, weight, targets), wanted)


def test_autocast_leaves_float64_alone():
    x, weight, targets = example()
    with torch.autocast("cpu", torch.bfloat16):
        close(linear_cross_entropy(x, weight, targets), plain(x, weight, targets), 1e-13)


def test_autocast_computes_narrow_and_keeps_wide_gradients():
    """The mean over 11 rows is no power of two: divided by in 16 bits, every gradient would be off by the same part."""
    x, weight, targets = example(n=11, d=32, v=48, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = linear_cross_entropy(x, weight, targets)
    exact = plain(x, weight, targets)
    assert narrow.dtype == torch.float32
    close(narrow, exact, 0.02)
    for a, b in zip(torch.autograd.grad(narrow, (x, weight)), torch.autograd.grad(exact, (x, weight)), strict=True):
        assert a.dtype == torch.float32
        close(a, b, 0.02, scale=0)
        ratio = (a * b).sum() / (b * b).sum()
        assert abs(ratio.item() - 1) < 2e-3


@pytest.mark.parametrize("ignored", [(), (1, 4), range(5)])
def test_gradcheck(ignored):
    x, weight, targets = example(n=5, d=3, v=4, ignored=ignored)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets, 2), (x, weight), rtol=1e-6)


def test_no_rows_at_all():
    x, weight, targets = example(n=0)
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.abs().max() == 0


def test_a_weight_that_is_used_elsewhere_gets_both_gradients():
    _, weight, targets = example()
    tokens = torch.randint(0, 13, (11,))

    def gradient(loss_of):
        return torch.autograd.grad(loss_of(weight[tokens].sin(), weight, targets), weight)[0]

    close(gradient(lambda *a: linear_cross_entropy(*a, 4)), gradient(plain), 1e-13)


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_only_one_gradient_asked(wanted):
    x, weight, targets = example()
    x.requires_grad_(wanted == "x")
    weight.requires_grad_(wanted == "weight")
    leaf = x if wanted == "x" else weight
    ours = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 4), leaf)[0]
    close(ours, torch.autograd.grad(plain(x, weight, targets), leaf)[0], 1e-13)


def test_without_gradients_none_are_made():
    """Evaluation must not pay for the (V, D) gradient of a weight that would like one."""
    x, weight, targets = example(n=64, d=32, v=64, dtype=torch.float32)
    with torch.no_grad(), torch.profiler.profile() as profile:
        loss = linear_cross_entropy(x.detach(), weight, targets, 64)
    products = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
    assert products == 1
    close(loss, plain(x, weight, targets), 1e-6)


def test_second_derivatives_are_refused():
    x, weight, targets = example()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(linear_cross_entropy(x, weight, targets), x, create_graph=True)


def test_retained_graph_gives_the_same_gradient_twice():
    x, weight, targets = example()
    loss = linear_cross_entropy(x, weight, targets, 3)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype):
    x, weight, targets = example(n=200, d=16, v=50, ignored=(3, 5), dtype=dtype)
    loss = linear_cross_entropy(x, weight, targets, 64)
    assert loss.dtype == torch.float32
    loss.backward()
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    wanted = plain(exact_x, exact_weight, targets)
    wanted.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    close(loss.double(), wanted, tolerance)
    for leaf, exact in ((x, exact_x), (weight, exact_weight)):
        assert leaf.grad.dtype == dtype
        close(leaf.grad.double(), exact.grad, 2 * tolerance, scale=0)


def test_large_logits_do_not_overflow():
    x = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.tensor([0, 0]))
    assert loss.item() == pytest.approx(1e4)
    loss.backward()
    assert torch.isfinite(x.grad).all()


def test_uniform_logits_cost_ln_v():
    zero = torch.zeros(7, 4)
    assert linear_cross_entropy(zero, torch.randn(50, 4), torch.arange(7)).item() == pytest.approx(3.912023, abs=1e-6)


STEP = """
import sys, torch, moemla
import torch.nn.functional as F
from tests.helpers import peak_memory
torch.set_num_threads(1)
torch.manual_seed(0)
model = moemla.LanguageModel(moemla.ModelConfig.preset("XS", vocab_size=50257)).train()
tokens, targets = torch.randint(0, 50257, (2, 8, 512))
if sys.argv[1] == "naive":
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
else:
    loss = model(tokens, targets)
loss.backward()
slopes = sum(p.grad.double().abs().sum() for p in model.parameters())
print(loss.item(), slopes.item(), peak_memory())
"""


def test_a_step_at_xs_takes_two_fifths_of_the_memory_of_whole_logits():
    """Peaks of two processes, all that Python and torch hold included: 8 x 512 tokens, 50,257 in the vocabulary."""
    found = {}
    for which in ("naive", "chunked"):
        done = subprocess.run(
            [sys.executable, "-c", STEP, which], capture_output=True, text=True, timeout=300, check=True
        )
        found[which] = [float(word) for word in done.stdout.split()]
    (loss, slopes, peak), (wanted, wanted_slopes, naive_peak) = found["chunked"], found["naive"]
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert slopes == pytest.approx(wanted_slopes, rel=1e-5)
    assert peak < 0.4 * naive_peak


def test_a_loss_scale_in_half_precision():
    """Two hundred small slopes of float16 rows: scaled after they were rounded they would be zero or inf."""
    x, weight, targets = example(n=200, d=16, v=50, dtype=torch.float16)
    with torch.no_grad():
        weight *= 2e-2
    (linear_cross_entropy(x, weight, targets, 64) * 2**16).backward()
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    (plain(exact_x, exact_weight, targets) * 2**16).backward()
    for leaf, exact in ((x, exact_x), (weight, exact_weight)):
        close(leaf.grad.double(), exact.grad, 2e-2, scale=0)
