"""Every loss against its formula, written out in NumPy at double precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import open_clip
import pytest
import torch

from abd_core import losses

B, D = 7, 5


def unit(seed: int, batch: int = B, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random unit rows (B, D)."""
    rows = torch.randn(batch, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows / rows.norm(dim=1, keepdim=True)).to(dtype)


X, Y, T, Z = (unit(seed) for seed in range(4))


def nce(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> float:
    logits = scale * queries.numpy() @ keys.numpy().T
    return float(np.mean([-np.log(np.exp(row[i]) / np.exp(row).sum()) for i, row in enumerate(logits)]))


def eq2(x: torch.Tensor, x_bd: torch.Tensor, others: torch.Tensor, tau: float) -> float:
    """Eq. (2) sample by sample: the positive is x_bd's, the other terms of the sum are those of `others`."""
    total = 0.0
    for i in range(len(x)):
        positive = np.exp(float(x[i] @ x_bd[i]) / tau)
        rest = sum(np.exp(float(x[i] @ others[j]) / tau) for j in range(len(x)) if j != i)
        total += -np.log(positive / (positive + rest))
    return total / len(x)


def graph(features: torch.Tensor) -> np.ndarray:
    """Similarities to the other samples, mapped to (0, 1), as shares of their sum."""
    n = len(features)
    similarity = np.array([[(float(features[i] @ features[j]) + 1) / 2 * (i != j) for j in range(n)] for i in range(n)])
    return similarity / similarity.sum(axis=1, keepdims=True)


def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """KL(P||Q) + KL(1-P||1-Q), summed over a sample's neighbours, averaged over samples."""
    p, q = graph(a), graph(b)
    pairs = [(p[i, j], q[i, j]) for i in range(len(p)) for j in range(len(p)) if i != j]
    return sum(x * np.log(x / y) + (1 - x) * np.log((1 - x) / (1 - y)) for x, y in pairs) / len(p)


def bce(logits: torch.Tensor, label: float) -> float:
    share = 1 / (1 + np.exp(-logits.numpy()))
    return float(np.mean(-label * np.log(share) - (1 - label) * np.log(1 - share)))


REAL, FAKE = (torch.tensor(v, dtype=torch.float64) for v in ([2.0, -1.0, 0.3], [0.5, -3.0, 1.5]))
IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

FORMULAS: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], float]]] = {
    "info_nce": (lambda: losses.info_nce(X, Y, scale=3.0), lambda: nce(X, Y, 3.0)),
    "clip_loss": (lambda: losses.clip_loss(X, Y, 14.0), lambda: (nce(X, Y, 14.0) + nce(Y, X, 14.0)) / 2),
    "backdoor_loss": (lambda: losses.backdoor_loss(X, Y), lambda: eq2(X, Y, Y, 0.1)),
    "backdoor_loss, tau": (lambda: losses.backdoor_loss(X, Y, tau=0.5), lambda: eq2(X, Y, Y, 0.5)),
    "backdoor_loss, clean negatives": (
        lambda: losses.backdoor_loss(X, Y, tau=0.3, negatives=X),
        lambda: eq2(X, Y, X, 0.3),
    ),
    "backdoor_loss, other negatives": (
        lambda: losses.backdoor_loss(X, Y, tau=0.3, negatives=Z),
        lambda: eq2(X, Y, Z, 0.3),
    ),
    "adversarial_loss": (
        lambda: losses.adversarial_loss(X, Y, T),
        lambda: -nce(X, Y, 10.0) - 5 * nce(Y, T, 10.0),
    ),
    "adversarial_loss, settings": (
        lambda: losses.adversarial_loss(X, Y, T, tau=0.5, text_weight=2.0),
        lambda: -nce(X, Y, 2.0) - 2 * nce(Y, T, 2.0),
    ),
    "neighbour_graph_divergence": (lambda: losses.neighbour_graph_divergence(X, Y), lambda: divergence(X, Y)),
    "topology_loss": (
        lambda: losses.topology_loss(X, Y, T),
        lambda: -divergence(X, Y) - 5 * divergence(Y, T),
    ),
    "topology_loss, settings": (
        lambda: losses.topology_loss(X, Y, T, text_weight=0.5),
        lambda: -divergence(X, Y) - 0.5 * divergence(Y, T),
    ),
    "quality_loss": (
        lambda: losses.quality_loss(IMAGES, IMAGES**2),
        lambda: float(np.mean((IMAGES.numpy() - IMAGES.numpy() ** 2) ** 2)),
    ),
    "discriminator_loss": (lambda: losses.discriminator_loss(REAL, FAKE), lambda: (bce(REAL, 1) + bce(FAKE, 0)) / 2),
    "generator_loss": (lambda: losses.generator_loss(FAKE), lambda: bce(FAKE, 1)),
}


@pytest.mark.parametrize(("loss", "formula"), FORMULAS.values(), ids=FORMULAS.keys())
def test_a_loss_is_its_formula(loss: Callable[[], torch.Tensor], formula: Callable[[], float]):
    assert loss().shape == ()
    assert loss().item() == pytest.approx(formula(), rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_the_clip_loss_is_open_clip_s_with_its_gradients(scale: float):
    def gradients(loss: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [
            unit(5, 33, torch.float32).requires_grad_(),
            unit(6, 33, torch.float32).requires_grad_(),
            torch.tensor(scale, requires_grad=True),
        ]
        value = loss(*inputs)
        value.backward()
        return [value.detach(), *(x.grad for x in inputs)]

    for ours, theirs in zip(gradients(losses.clip_loss), gradients(open_clip.ClipLoss()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y, t: losses.info_nce(x, y, scale=3.0),
        lambda x, y, t: losses.clip_loss(x, y, t.square().sum()),
        lambda x, y, t: losses.backdoor_loss(x, y),
        lambda x, y, t: losses.backdoor_loss(x, y, negatives=x),
        lambda x, y, t: losses.backdoor_loss(x, y, negatives=t),
        losses.adversarial_loss,
        losses.topology_loss,
        lambda x, y, t: losses.quality_loss(x, y),
    ],
    ids=["info_nce", "clip", "backdoor", "backdoor clean", "backdoor other", "adversarial", "topology", "quality"],
)
def test_gradients_are_those_of_finite_differences(loss: Callable[..., torch.Tensor]):
    inputs = [(0.9 * unit(seed, 4)).requires_grad_() for seed in (10, 11, 12)]
    assert torch.autograd.gradcheck(lambda *xs: loss(*xs) + 0 * sum(x.sum() for x in xs), inputs)


@pytest.mark.parametrize("loss", [losses.discriminator_loss, lambda real, fake: losses.generator_loss(fake)])
def test_gradients_of_the_gan_losses_are_those_of_finite_differences(loss: Callable[..., torch.Tensor]):
    inputs = [x.clone().requires_grad_() for x in (REAL, FAKE)]
    assert torch.autograd.gradcheck(lambda *xs: loss(*xs) + 0 * sum(x.sum() for x in xs), inputs)


def test_identical_graphs_do_not_differ_and_others_do():
    assert losses.neighbour_graph_divergence(X, X).item() == pytest.approx(0, abs=1e-12)
    assert losses.neighbour_graph_divergence(X, Y).item() > 1e-4


def rotation(seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


TWO = {
    "info_nce": lambda x, y: losses.info_nce(x, y, scale=3.0),
    "clip": lambda x, y: losses.clip_loss(x, y, 3.0),
    "backdoor": losses.backdoor_loss,
    "backdoor clean": lambda x, y: losses.backdoor_loss(x, y, negatives=x),
    "divergence": losses.neighbour_graph_divergence,
}


@pytest.mark.parametrize("loss", TWO.values(), ids=TWO.keys())
def test_a_loss_depends_on_similarities_alone_and_not_on_the_order_of_samples(loss: Callable[..., torch.Tensor]):
    turned = loss(X @ rotation(0), Y @ rotation(0))
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert turned.item() == pytest.approx(loss(X, Y).item(), rel=1e-9)
    assert loss(X[order], Y[order]).item() == pytest.approx(loss(X, Y).item(), rel=1e-9)
    assert loss(X, Y[order]).item() != pytest.approx(loss(X, Y).item(), rel=1e-3)


def test_the_divergence_compares_graphs_not_features():
    assert losses.neighbour_graph_divergence(X, X @ rotation(1)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [0.5, 100.0])
def test_equal_features_cannot_be_told_apart(scale: float):
    same = unit(0, 1).expand(B, D)
    assert losses.clip_loss(same, same, scale).item() == pytest.approx(np.log(B))


def test_large_scales_do_not_overflow():
    value = losses.clip_loss(X.float(), Y.float(), 1e6)
    assert torch.isfinite(value)


def test_losses_of_features_without_neighbours_stay_finite():
    opposite = torch.stack([X[0], -X[0]])  # no similarity left once the diagonal is out
    for value in (losses.neighbour_graph_divergence(opposite, X[:2]), losses.topology_loss(X[:1], X[:1], X[:1])):
        assert torch.isfinite(value)


def test_more_texts_than_images_are_refused():
    with pytest.raises(ValueError, match="both directions need as many keys as queries, not 8 and 7"):
        losses.clip_loss(X, unit(1, B + 1), 1.0)
