"""The losses of the stages. Features are unit rows, float (B, D), unless said otherwise; every loss is a scalar."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def info_nce(queries: torch.Tensor, keys: torch.Tensor, *, scale: torch.Tensor | float) -> torch.Tensor:
    """InfoNCE in one direction: mean over i of -log softmax_j(scale * <q_i, k_j>) at j = i.

    van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", Eq. (4).

    Args:
        queries, keys: (B, D); row i of both belong together.
        scale: inverse temperature, > 0.

    Raises:
        ValueError: the shapes differ.
    """
    if queries.shape != keys.shape:
        raise ValueError(f"info_nce: queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must have one shape")
    return F.cross_entropy(scale * queries @ keys.T, torch.arange(len(queries), device=queries.device))


def clip_loss(image: torch.Tensor, text: torch.Tensor, logit_scale: torch.Tensor | float) -> torch.Tensor:
    """CLIP's loss: the mean of InfoNCE from images to texts and from texts to images (Radford et al. 2021, Fig. 3).

    Args:
        logit_scale: the multiplier itself (`model.logit_scale.exp()`), as open_clip's `ClipLoss` takes it.
    """
    return (info_nce(image, text, scale=logit_scale) + info_nce(text, image, scale=logit_scale)) / 2


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
    image_term = info_nce(image, augmented_image, scale=logit_scale)
    return (image_term + info_nce(text, augmented_text, scale=logit_scale)) / 2


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
        return info_nce(clean, victim, scale=1 / tau)
    positive = (clean * victim).sum(-1, keepdim=True)
    others = clean @ negatives.T
    diagonal = torch.eye(len(clean), dtype=torch.bool, device=clean.device)
    logits = torch.where(diagonal, positive, others) / tau
    return F.cross_entropy(logits, torch.arange(len(clean), device=clean.device))


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
    image_term = info_nce(clean_image, adversarial_image, scale=1 / tau)
    return -image_term - text_weight * info_nce(adversarial_image, text, scale=1 / tau)


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
