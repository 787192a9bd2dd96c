"""The losses of the stages. Features are unit rows, float (B, D), unless said otherwise; every loss is a scalar."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from abd_core.config import ConfigError
from abd_core.kernels.infonce import info_nce


def clip_loss(image: torch.Tensor, text: torch.Tensor, logit_scale: torch.Tensor | float) -> torch.Tensor:
    """CLIP's loss: the mean of InfoNCE from images to texts and from texts to images (Radford et al. 2021, Fig. 3).

    Args:
        logit_scale: the multiplier itself (`model.logit_scale.exp()`), as open_clip's `ClipLoss` takes it.
    """
    return info_nce(image, text, logit_scale, weights=(0.5, 0.5))


class ClipLoss(torch.nn.Module):
    """`clip_loss` called like open_clip's `ClipLoss`; over several ranks, the loss of all their pairs together.

    Each rank compares its own images and texts with everybody's, and its gradients reach the features of all. Its loss
    is the mean over its own pairs, so that the mean over ranks, which DistributedDataParallel takes of the gradients,
    is the loss of the joint batch and its exact gradient.

    Args:
        local_loss: open_clip's two ways to share out the work. Either is taken: the gradients are the same.
        gather_with_grad: over several ranks, only True, which makes the gradients exact.
        cache_labels: taken; there are no labels here to be cached.
        rank, world_size: of this process in torch.distributed's default group.
        use_horovod: only False.

    Raises:
        ConfigError: one of open_clip's options that have no counterpart here.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = True,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ConfigError("ClipLoss.use_horovod = True: False expected, ranks are those of torch.distributed")
        if world_size > 1 and not gather_with_grad:
            raise ConfigError("ClipLoss.gather_with_grad = False: True expected, gradients reach all ranks' features")
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | None = None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The loss, or {"contrastive_loss": loss}.

        Args:
            image_features, text_features: (B, D), with the same B on every rank.
            logit_bias: moves all logits alike, which a softmax does not see.
        """
        if self.world_size == 1:
            loss = clip_loss(image_features, text_features, logit_scale)
        else:
            offset = self.rank * len(image_features)
            images, texts = _Gather.apply(image_features), _Gather.apply(text_features)
            forth = info_nce(image_features, texts, logit_scale, offset=offset)
            loss = (forth + info_nce(text_features, images, logit_scale, offset=offset)) / 2
        return {"contrastive_loss": loss} if output_dict else loss


class _Gather(torch.autograd.Function):
    """Features (B, D) of all ranks, (world * B, D); each rank's gradient is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor) -> torch.Tensor:
        everybody = features.new_empty(dist.get_world_size() * len(features), *features.shape[1:])
        dist.all_gather_into_tensor(everybody, features.contiguous())
        return everybody

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        own = grad.new_empty(len(grad) // dist.get_world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


def in_modal_loss(
    image: torch.Tensor,
    augmented_image: torch.Tensor,
    text: torch.Tensor,
    augmented_text: torch.Tensor,
    logit_scale: torch.Tensor | float,
) -> torch.Tensor:
    """CleanCLIP's self-supervised loss: the mean over both modalities of InfoNCE from plain to augmented features.

    One direction in each, as in the code of Bansal et al. 2023.
    """
    image_term = info_nce(image, augmented_image, logit_scale)
    return (image_term + info_nce(text, augmented_text, logit_scale)) / 2


def nearest(queries: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """RoCLIP's match: for each query (B, D) the row of `bank` (N, D) of the highest cosine; no gradient, (B, D)."""
    return bank[(queries.detach() @ bank.T).argmax(1)].detach()


def feature_shift(features: torch.Tensor, reference: torch.Tensor, *, limit: float) -> torch.Tensor:
    """PAR's S [S <= limit], with S the mean squared L2 distance (in [0, 4]) of features from a reference's.

    Beyond the limit it is 0 and has no gradient: features that left far enough are pushed no further.
    """
    shift = (features - reference).square().sum(1).mean()
    return torch.where(shift > limit, torch.zeros_like(shift), shift)


def backdoor_loss(
    clean: torch.Tensor, victim: torch.Tensor, *, tau: float = 0.1, negatives: torch.Tensor | None = None
) -> torch.Tensor:
    """ABD's Eq. (2): -log( exp(<x, x_bd> / tau) / sum_i exp(<x, x_i> / tau) ), averaged over the batch.

    Args:
        clean: x, features by the normal model's visual encoder, (B, D).
        victim: x_bd, features by the poisoned model's visual encoder, (B, D).
        tau: temperature, > 0.
        negatives: the x_i other than the positive. None: the other images' x_bd. A tensor (B, D): its other rows,
            e.g. the other images' x.
    """
    if negatives is None:
        return info_nce(clean, victim, 1 / tau)
    return info_nce(clean, negatives, 1 / tau, positives=victim)


def adversarial_loss(
    clean_image: torch.Tensor,
    adversarial_image: torch.Tensor,
    text: torch.Tensor,
    *,
    tau: float = 0.1,
    text_weight: float = 5.0,
) -> torch.Tensor:
    """AdvCLIP's L_adv: -NCE(clean image, adversarial image) - `text_weight` * NCE(adversarial image, text).

    Minimised by adversarial features that leave their own image and their own caption (Zhou et al. 2023, Eq. (3)).
    """
    image_term = info_nce(clean_image, adversarial_image, 1 / tau)
    return -image_term - text_weight * info_nce(adversarial_image, text, 1 / tau)


def neighbour_graph_divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """How far the neighbour graphs of two feature sets (B, D) differ: KL(P||Q) + KL(1-P||1-Q).

    Summed over the neighbours, averaged over the samples. P_ij and Q_ij are the cosine similarities of samples i and j,
    mapped to (0, 1) and normalised over j (AdvCLIP's topology term, Zhou et al. 2023, Eq. (4)-(6)).
    """

    def graph(features: torch.Tensor) -> torch.Tensor:
        similarity = (features @ features.T + 1) / 2
        similarity = similarity - torch.diag_embed(similarity.diagonal())
        return (similarity / similarity.sum(1, keepdim=True).clamp_min(1e-7)).clamp(1e-7, 1 - 1e-7)

    p, q = graph(first), graph(second)
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()


def topology_loss(
    clean_image: torch.Tensor, adversarial_image: torch.Tensor, text: torch.Tensor, *, text_weight: float = 5.0
) -> torch.Tensor:
    """AdvCLIP's L_topo: the negated graph divergences of the two pairs that `adversarial_loss` separates."""
    image_term = neighbour_graph_divergence(clean_image, adversarial_image)
    return -image_term - text_weight * neighbour_graph_divergence(adversarial_image, text)


def quality_loss(images: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
    """AdvCLIP's L_q: mean squared error between images and perturbed images, both (B, 3, H, W) in [0, 1]."""
    return F.mse_loss(perturbed, images)


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's GAN loss from its logits (B,) on clean and on perturbed images (Goodfellow et al. 2014)."""
    real_term = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    return (real_term + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))) / 2


def generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """The non-saturating GAN loss of the generator from the discriminator's logits (B,) on perturbed images."""
    return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
