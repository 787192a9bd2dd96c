"""Which training pairs look poisoned? Scores under the suspect, higher for what is more suspicious.

Whoever holds the data that a suspect was trained on can look for the poison in it. Images with one trigger get nearly
one feature, so they crowd together, and the suspect holds them nearer to their captions than clean weights do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import open_clip
import torch

from abd_core import models
from abd_core.text import tokenize

NEIGHBOURS = 16  # Huang et al. 2025 look at the 16 nearest of a batch


def neighbour_distances(features: torch.Tensor, k: int = NEIGHBOURS) -> torch.Tensor:
    """Distances (N, k) of unit features (N, D) to their k nearest others, ascending, Euclidean.

    Raises:
        ValueError: k is below 1, or fewer than k + 1 rows.
    """
    if k < 1:
        raise ValueError(f"{k} nearest: at least 1 expected")
    if len(features) <= k:
        raise ValueError(f"{k} nearest of {len(features)} features: at least {k + 1} expected")
    rows = []
    for start in range(0, len(features), 1024):
        part = features[start : start + 1024]
        squared = (2 - 2 * part @ features.T).clamp_min(0)
        squared[torch.arange(len(part)), torch.arange(start, start + len(part))] = torch.inf
        rows.append(squared.topk(k, largest=False).values.sqrt())
    return torch.cat(rows)


def local_intrinsic_dimensionality(distances: torch.Tensor) -> torch.Tensor:
    """Its maximum-likelihood estimate (N,) from neighbour distances (N, k): -1 / mean log(d_i / d_k).

    Levina and Bickel (2004), Amsaleg et al. (2015). Neighbours at no distance count as 1e-6 of the farthest one's.

    Raises:
        ValueError: k is below 2: the farthest alone says nothing.
    """
    if distances.shape[1] < 2:
        raise ValueError(f"dimensionality from {distances.shape[1]} nearest: at least 2 expected")
    farthest = distances[:, -1:].clamp_min(1e-12)
    logs = (distances[:, :-1] / farthest).clamp(1e-6, 1).log().mean(1)
    return -1 / logs.clamp_max(-1e-6)


@torch.no_grad()
def pair_features(
    model: open_clip.CLIP, images: torch.Tensor, captions: Sequence[str], *, batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features (N, D) of images (N, 3, R, R) in [0, 1] and of their captions, on the CPU."""
    image, text = [], []
    for start in range(0, len(captions), batch_size):
        chosen = slice(start, start + batch_size)
        tokens = tokenize(captions[chosen], context_length=model.context_length)
        image.append(models.encode_image(model, images[chosen]).cpu())
        text.append(models.encode_text(model, tokens).cpu())
    return torch.cat(image), torch.cat(text)


def scores(
    suspect: open_clip.CLIP,
    images: torch.Tensor,
    captions: Sequence[str],
    *,
    reference: open_clip.CLIP | None = None,
    k: int = NEIGHBOURS,
) -> dict[str, torch.Tensor]:
    """Scores of N pairs, float (N,) each.

    - "misfit": minus the cosine of image and caption. Many images that share one caption fit it less than single ones.
    - "gap": that cosine minus the clean weights', where these are known.
    - "lid": minus the local intrinsic dimensionality of the image feature among the others.
    - "crowding": minus the distance to the k-th nearest image feature.

    Huang et al. (2025) look for *far* neighbours and high dimensionality: of few poisoned pairs among many, a batch
    holds hardly two. Where a batch of k neighbours holds many, as at this benchmark's doses, it is the near ones.

    Raises:
        ValueError: k is below 2, fewer than k + 1 pairs, or another number of captions.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images, {len(captions)} captions")
    image, text = pair_features(suspect, images, captions)
    distances = neighbour_distances(image, k)
    cosine = (image * text).sum(1)
    found = {"misfit": -cosine}
    if reference is not None:
        clean_image, clean_text = pair_features(reference, images, captions)
        found["gap"] = cosine - (clean_image * clean_text).sum(1)
    return {**found, "lid": -local_intrinsic_dimensionality(distances), "crowding": -distances[:, -1]}


def precision_recall(score: torch.Tensor, poisoned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Precision and recall (N,) of calling the i first in the order of `score` poisoned; ties in their given order.

    Raises:
        ValueError: nothing is poisoned.
    """
    if not poisoned.any():
        raise ValueError("precision_recall: no poisoned pair")
    hits = poisoned[score.argsort(descending=True, stable=True)].double().cumsum(0)
    return hits / torch.arange(1, len(score) + 1), hits / hits[-1]


def average_precision(score: torch.Tensor, poisoned: torch.Tensor) -> float:
    """Area under the steps of the precision-recall curve; a random order reaches the share of poisoned pairs."""
    precision, recall = precision_recall(score, poisoned)
    steps = torch.diff(recall, prepend=recall.new_zeros(1))
    return math.fsum((precision * steps).tolist())


def average_precisions(found: Mapping[str, torch.Tensor], poisoned: torch.Tensor) -> dict[str, float]:
    return {name: average_precision(score, poisoned) for name, score in found.items()}
