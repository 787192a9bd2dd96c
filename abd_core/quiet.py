"""An attacker who knows the defence: the victim is trained to answer universal perturbations as the clean model does.

ABD, ABD-D and the audit all look for perturbations of whole sets of images that move the victim and not the clean
model. This attacker looks for them too, while poisoning, and trains their effect away: universal adversarial training
(Shafahi et al. 2020) in which pixels and weights are updated together, step by step, on the disagreement that ABD-D
searches (`disagreement`).
"""

from __future__ import annotations

import open_clip
import torch

from abd_core import models, ranks
from abd_core.data import rng
from abd_core.disagreement import Disagreement

SIDES = (1 / 16, 3 / 8)  # of the windows, as shares of the image's: from a trigger's to the largest that ABD-D shows
BOUND = 0.1  # of the field, ABD-D's
STEP = 0.1  # of a window's pixel; of the field's: times its bound
RESTART = 20  # steps after which pixels are drawn afresh, so that the victim meets all stages of a search


class Quiet:
    """The universal perturbations of an attacker who makes the victim quiet.

    Their pixels are buffers of the model while it is trained, so that a resume file holds them.
    """

    def __init__(self, model: open_clip.CLIP, clean: open_clip.CLIP, *, seed: int) -> None:
        """`clean` is frozen; `model` has no buffers of these names."""
        self.model, self.clean, self.seed = model, clean, seed
        self.pixels: list[torch.Tensor] = []  # of the last batch
        size = models.resolution(clean)
        for name in ("quiet_window", "quiet_field"):
            model.register_buffer(name, torch.zeros(3, size, size, device=models.device()))

    def close(self) -> None:
        """Take the pixels out of the model."""
        del self.model.quiet_window, self.model.quiet_field

    def perturbed(self, images: torch.Tensor, step: int) -> torch.Tensor:
        """One half of images (B, 3, R, R) under windows, the other under the field."""
        source = rng(self.seed, "quiet", step)
        window, field = self.model.quiet_window, self.model.quiet_field
        if step % RESTART == 0:
            window.copy_(torch.rand(window.shape, generator=source))
            field.copy_(BOUND * (2 * torch.rand(field.shape, generator=source) - 1))
        self.pixels = [stored.clone().requires_grad_() for stored in (window, field)]
        return Disagreement(self.pixels[0], self.pixels[1], sides=SIDES)(images, source)

    def shift(self, features: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
        """Mean of 1 - cosine of the victim's unit features (B, D) of `perturbed` images and the clean model's.

        The pixels move one signed step up it. They have a backward pass of their own: where BatchNorm trains, plain
        images share the batch's moments with the perturbed ones, and the loss of those is not what is searched.
        """
        away = 1 - (features * models.encode_image(self.clean, perturbed)).sum(-1).mean()
        grads = torch.autograd.grad(away, self.pixels, retain_graph=True)
        limits = {"quiet_window": (STEP, 0.0, 1.0), "quiet_field": (STEP * BOUND, -BOUND, BOUND)}
        for grad, (name, (length, low, high)) in zip(grads, limits.items(), strict=True):
            self.model.get_buffer(name).add_(length * ranks.summed(grad).sign()).clamp_(low, high)
        return away
