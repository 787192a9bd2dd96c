"""BadCLIP's patch (Liang et al. 2024): optimised on the clean model, before anything is poisoned."""

from __future__ import annotations

import math
from collections.abc import Callable

import open_clip
import torch
import torch.nn.functional as F

from abd_core import models
from abd_core.config import TrainingError, derive_seed
from abd_core.data import TrainingPairs, rng
from abd_core.text import tokenize

BATCH_SIZE = 64  # of the reference code
VIEWS = 512  # images that the patch is fitted on, drawn once; 75 pixels need no more


def patch_loss(
    triggered: torch.Tensor,
    target_text: torch.Tensor,
    own_text: torch.Tensor,
    target_image: torch.Tensor,
    untriggered: torch.Tensor,
    *,
    scale: torch.Tensor | float,
    triplet_weight: float,
    margin: float = 1.0,
) -> torch.Tensor:
    """InfoNCE towards captions of the target + `triplet_weight` * a triplet loss towards its images.

    The triplets' anchors are the triggered images, their positives real images of the target, their negatives the same
    images *without* the trigger; distances are Euclidean. InfoNCE's negatives are the captions that the batch's images
    have: the captions of one target are much alike, and must not be each other's negatives.

    Args:
        triggered, target_text, own_text, target_image, untriggered: unit features, float (B, D).
        scale: inverse temperature of InfoNCE, > 0.
    """
    positive = (triggered * target_text).sum(-1, keepdim=True)
    logits = scale * torch.cat([positive, triggered @ own_text.T], 1)  # (B, 1 + B)
    contrast = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
    return contrast + triplet_weight * F.triplet_margin_loss(triggered, target_image, untriggered, margin=margin)


def optimise(
    patch: torch.Tensor,
    put: Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor],
    *,
    model: open_clip.CLIP,
    pairs: TrainingPairs,
    target: str,
    seed: int,
    steps: int,
    lr: float,
    triplet_weight: float,
) -> torch.Tensor:
    """A patch (3, h, w) in [0, 1] that moves images of other classes to where `model` has the target.

    Adam on the pixels, over views of images of other classes. These views, those of the target, the captions and their
    features are drawn once; in a step the triggered images alone go through the model.

    Args:
        patch: where to start, (3, h, w) in [0, 1]; left as it is.
        put: (patch, images (B, 3, R, R), generator) -> triggered images, differentiable in the patch.
        model: the clean model, frozen.
        pairs: hold at least one pair of the target, and one of another class.

    Raises:
        TrainingError: the loss or a pixel became NaN or infinite.
    """
    source = rng(seed, "badclip")
    views = derive_seed(seed, "badclip")

    def drawn(of_target: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images, and features of images and captions, of `VIEWS` random pairs of the target or of the others."""
        among = (pairs.shows(target) == of_target).nonzero().flatten()
        indices = among[torch.randint(len(among), (VIEWS,), generator=source)]
        images = pairs.images(indices, seed=views, step=int(of_target))
        # A view has a caption of its own, as if it were seen in an epoch of its own.
        captions = [pairs.captions(i, seed=views, epoch=view)[0] for view, i in enumerate(indices.split(1))]
        tokens = tokenize(captions, context_length=model.context_length)
        with torch.no_grad():
            image = torch.cat([models.encode_image(model, batch) for batch in images.split(BATCH_SIZE)])
            text = torch.cat([models.encode_text(model, batch) for batch in tokens.split(BATCH_SIZE)])
        return images, image, text

    images, untriggered, own_text = drawn(of_target=False)
    _, target_image, target_text = drawn(of_target=True)
    patch = patch.clone().requires_grad_()
    optimizer = torch.optim.Adam([patch], lr=lr)
    for step in range(steps):
        batch, partners = torch.randint(VIEWS, (2, BATCH_SIZE), generator=source)
        loss = patch_loss(
            models.encode_image(model, put(patch, images[batch], source)),
            target_text[partners],
            own_text[batch],
            target_image[partners],
            untriggered[batch],
            scale=model.logit_scale.exp(),
            triplet_weight=triplet_weight,
        )
        if not math.isfinite(loss.item()):
            raise TrainingError(f"badclip: the patch's loss is {loss.item()} at step {step}: lower patch_lr = {lr:g}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
        if not torch.isfinite(patch).all():
            raise TrainingError(f"badclip: the patch holds NaN after step {step}: lower patch_lr = {lr:g}")
    return patch.detach()
