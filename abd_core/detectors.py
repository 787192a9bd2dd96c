"""Detectors of backdoors in a CLIP, under one interface: what they look at is a model, images and class names.

None of them reads anything of an attack. A detector measures one model (`Detector.measure`); where the published clean
weights are at hand, the same measurement of these is what it is compared with (`Detector.statistics`). Another detector
is one subclass and one line in `DETECTORS`.

Shapes: N images, K classes, S slots (a slot is one perturbation: its place and size), R the images' side in pixels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import open_clip
import torch
import torch.nn.functional as F

from abd_core import models
from abd_core.data import rng
from abd_core.kernels.perturb import add, blend, warp
from abd_core.text import tokenize
from abd_core.train import progress

CHUNK = 256  # images a forward pass


@dataclass(frozen=True, eq=False)
class Observed:
    """A frozen model with what all detectors need of it.

    Attributes:
        images: float (N, 3, R, R) in [0, 1]; the first half is for optimising, the rest for measuring.
        features: unit (N, D), of the images.
        classes: the zero-shot classifier, unit (K, D).
        predicted: int64 (N,), the class that each image is given to.
    """

    model: open_clip.CLIP
    images: torch.Tensor
    features: torch.Tensor
    classes: torch.Tensor
    predicted: torch.Tensor

    @property
    def half(self) -> int:
        return len(self.images) // 2


@torch.no_grad()
def observe(
    model: open_clip.CLIP, images: torch.Tensor, class_names: Sequence[str], templates: Sequence[str]
) -> Observed:
    """`model` frozen, its features of `images` (N, 3, R, R) in [0, 1], and its zero-shot classifier."""
    models.frozen(model)
    prompts = [template.format(name) for name in class_names for template in templates]
    tokens = tokenize(prompts, context_length=model.context_length)
    text = torch.cat([models.encode_text(model, part) for part in tokens.split(4 * CHUNK)])
    classes = F.normalize(text.view(len(class_names), len(templates), -1).mean(1), dim=-1)
    features = encode(model, images)
    return Observed(model, images, features, classes, (features @ classes.T).argmax(1))


def encode(model: open_clip.CLIP, images: torch.Tensor) -> torch.Tensor:
    """`models.encode_image` in chunks, without gradients."""
    with torch.no_grad():
        return torch.cat([models.encode_image(model, part) for part in images.split(CHUNK)])


def moved(observed: Observed, changed: torch.Tensor) -> torch.Tensor:
    """Share of the images of other classes that go to each class once they are changed, float (S, K) in [0, 1].

    Args:
        changed: (S, M, 3, R, R), the last M images of `observed`, perturbed in S ways.
    """
    slots, count = changed.shape[:2]
    answers = (encode(observed.model, changed.flatten(0, 1)) @ observed.classes.T).argmax(1).view(slots, count, 1)
    before = observed.predicted[-count:].view(1, count, 1)
    number = torch.arange(len(observed.classes), device=answers.device)
    other = before != number
    return ((answers == number) & other).sum(1) / other.sum(1).clamp_min(1)


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of shares (..., K); what is missing to a sum of 1 counts as one more class."""
    rest = (1 - shares.sum(-1, keepdim=True)).clamp_min(0)
    return torch.special.entr(torch.cat([shares, rest], -1)).sum(-1)


def outlierness(values: torch.Tensor) -> torch.Tensor:
    """How many robust standard deviations each of `values` (K,) lies above the median.

    The standard deviation is 1.4826 x the median absolute deviation, as for Neural Cleanse's anomaly index (Wang et al.
    2019); a hundredth of the range, where most values are equal and that deviation is 0.
    """
    centre = values.median()
    spread = 1.4826 * (values - centre).abs().median()
    floor = 0.01 * (values.max() - values.min())
    return (values - centre) / torch.maximum(spread, floor).clamp_min(1e-12)


@dataclass(frozen=True, eq=False)
class Finding:
    """What a detector measured of one model.

    Attributes:
        shares: float (S, K): what each slot does for each class; higher is more suspicious.
        patterns: float (S, 3, R, R) in [0, 1], the perturbations; empty where there are none.
        masks: float (S, 1, R, R) in [0, 1], where they act.
        numbers: further figures, JSON-able.
    """

    shares: torch.Tensor
    patterns: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 3, 1, 1))
    masks: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 1, 1, 1))
    numbers: Mapping[str, Any] = field(default_factory=dict)


class Detector(ABC):
    """A detector. Subclasses write `measure`; what is compared with the clean weights sets `compares`.

    Attributes:
        name: its key in `DETECTORS`.
        title: its name in tables and figures.
        source: where it comes from.
        compares: whether the clean weights are measured in the same way, where there are some.
        follows: whether it looks at the classes that the earlier detectors suspect.
        published: the settings of its source, by the names of `__init__`'s arguments; empty where it has none.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    compares: ClassVar[bool] = False
    follows: bool = False
    published: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def measure(self, observed: Observed, *, seed: int, ranked: Sequence[int] = ()) -> Finding:
        """Measure one model.

        Args:
            ranked: classes that earlier detectors suspect, most suspicious first; for one that `follows`.
        """

    @abstractmethod
    def statistics(self, finding: Finding, baseline: Finding | None) -> dict[str, float]:
        """The figures that the verdict may rest on, by names that no other detector uses."""

    def suspicion(self, finding: Finding, baseline: Finding | None) -> torch.Tensor:
        """How suspicious each class is, (K,): robust standard deviations above the median, or tenths of the images."""
        return outlierness(excess(finding, baseline).amax(0))


def excess(finding: Finding, baseline: Finding | None) -> torch.Tensor:
    """Shares (S, K) beyond those of the clean weights, where these are known."""
    return finding.shares if baseline is None else finding.shares - baseline.shares


# --- drift ----------------------------------------------------------------------------------------------------


def windows(resolution: int, sides: Sequence[float]) -> torch.Tensor:
    """Masks (9 x len(sides), 1, R, R) of squares of these sides (shares of R) in three rows of three, 1 px off."""
    masks = []
    for share in sides:
        side = max(1, round(share * resolution))
        places = (min(1, resolution - side), (resolution - side) // 2, max(resolution - side - 1, 0))
        for top in places:
            for left in places:
                mask = torch.zeros(1, resolution, resolution)
                mask[:, top : top + side, left : left + side] = 1
                masks.append(mask)
    return torch.stack(masks)


class Drift(Detector):
    """Where do universal patches drive the predictions that are optimised towards no class at all?

    In each of several places and sizes, a patch is optimised to take images away from their own features and from their
    class's caption: Eq. (5) of AdvCLIP (Zhou et al. 2023) without its GAN. A clean model's predictions scatter; a
    backdoored one's gather at the attacker's class. That universal perturbations of a backdoored classifier go for its
    target is Wang et al.'s finding (2020, "Practical detection of trojan neural networks"). The same patches as plain
    noise (`steps` = 0) are measured beside them.
    """

    name = "drift"
    title = "drift under universal patches"
    source = "Zhou et al. 2023 (AdvCLIP); Wang et al. 2020 (TrojanNet detector)"
    compares = True

    def __init__(
        self,
        *,
        sides: Sequence[float] = (16 / 224, 38 / 224),
        steps: int = 20,
        batch: int = 8,
        lr: float = 0.1,
        measured: int = 48,
    ) -> None:
        """`sides` as shares of the image's (a trigger's 16 of 224 px, AdvCLIP's 38); `batch` images a slot and step."""
        self.sides, self.steps, self.batch, self.lr, self.measured = sides, steps, batch, lr, measured

    def measure(self, observed: Observed, *, seed: int, ranked: Sequence[int] = ()) -> Finding:
        source = rng(seed, self.name)
        masks = windows(observed.images.shape[-1], self.sides).to(observed.images.device)
        start = torch.rand(len(masks), *observed.images.shape[1:], generator=source).to(masks)
        held = observed.images[observed.half :][-self.measured :]
        noise = moved(observed, stamped(held, start, masks))
        patterns = start.clone().requires_grad_()
        own = observed.classes[observed.predicted]
        optimizer = torch.optim.Adam([patterns], lr=self.lr, betas=(0.5, 0.9))
        with progress(stage=self.name, total=self.steps) as bar:
            for _ in range(self.steps):
                drawn = torch.randperm(observed.half, generator=source)[: self.batch]
                changed = stamped(observed.images[drawn], patterns, masks)
                features = models.encode_image(observed.model, changed.flatten(0, 1)).view(*changed.shape[:2], -1)
                near = (features * observed.features[drawn]).sum(-1) + (features * own[drawn]).sum(-1)
                optimizer.zero_grad()
                near.mean(1).sum().backward()  # each slot has its own patch, so the sum optimises each alone
                optimizer.step()
                with torch.no_grad():
                    patterns.clamp_(0, 1)
                bar.update()
        patterns = patterns.detach()
        shares = moved(observed, stamped(held, patterns, masks))
        numbers = {"noise": noise.amax().item(), "entropy": entropy(shares).amin().item()}
        return Finding(shares.cpu(), patterns.cpu(), masks.cpu(), numbers)

    def suspicion(self, finding: Finding, baseline: Finding | None) -> torch.Tensor:
        return 10 * excess(finding, baseline).amax(0)

    def statistics(self, finding: Finding, baseline: Finding | None) -> dict[str, float]:
        return {
            "drift": excess(finding, baseline).amax().item(),
            "drift_entropy": finding.numbers["entropy"],
            "noise_drift": finding.numbers["noise"],
        }


def stamped(images: torch.Tensor, patterns: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Each image (M, 3, R, R) under each pattern (S, 3, R, R) with its mask (S, 1, R, R): (S, M, 3, R, R)."""
    return torch.lerp(images[None], patterns[:, None], masks[:, None].expand(-1, -1, 3, -1, -1))


# --- response -------------------------------------------------------------------------------------------------


def corruptions(resolution: int, source: torch.Generator) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Common changes of whole images (B, 3, R, R) in [0, 1], none of them optimised; lengths are for 64 px."""
    side, unit = resolution, resolution / 64
    place = torch.arange(side)
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def blended(pattern: torch.Tensor, alpha: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: blend(images, pattern.expand(3, side, side), alpha)

    def added(delta: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: add(images, delta.expand(3, side, side))

    def warped(points: int, pixels: float) -> Callable[[torch.Tensor], torch.Tensor]:
        control = 2 * torch.rand(1, 2, points, points, generator=source) - 1
        flow = F.interpolate(control, (side, side), mode="bicubic", align_corners=True)[0]
        return lambda images: warp(images, pixels * unit * flow / flow.abs().mean())

    for alpha in (0.1, 0.2):
        found[f"noise, {alpha:g}"] = blended(torch.rand(3, side, side, generator=source), alpha)
    for cells in (32, 16, 4):
        coarse = torch.rand(1, 3, cells, cells, generator=source)
        found[f"blotches, {cells} a side"] = blended(F.interpolate(coarse, (side, side), mode="nearest")[0], 0.2)
    found["jitter"] = warped(side, 1.0)
    found["warp"] = warped(4, 1.5)
    for cycles in (3, 6):
        for name, axis in (("columns", place), ("rows", place[:, None])):
            found[f"waves in {name}, {cycles}"] = added(0.1 * (2 * math.pi * cycles * axis / side).sin())
    for name, shape in (("columns", (3, 1, side)), ("rows", (3, side, 1))):
        found[f"stripes in {name}"] = blended(torch.randint(2, shape, generator=source).float(), 0.1)
    found["blur"] = lambda images: F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return found


class Response(Detector):
    """Where do predictions go under common corruptions: noise, blotches, warps, waves, stripes, blur?

    A trigger that lies all over the image is seldom learnt as exactly that pattern: others of its kind set it off too,
    while a clean model's answers scatter. The corruptions are drawn afresh and optimised towards nothing; some are of
    the kind that known attacks use (Blended, SIG, WaNet), so that a trigger of a new kind may show nothing here.
    """

    name = "response"
    title = "answers under common corruptions"
    source = "this project; corruptions after Hendrycks and Dietterich 2019"
    compares = True

    def __init__(self, *, measured: int = 64) -> None:
        self.measured = measured

    def measure(self, observed: Observed, *, seed: int, ranked: Sequence[int] = ()) -> Finding:
        held = observed.images[observed.half :][-self.measured :]
        changes = corruptions(held.shape[-1], rng(seed, self.name))
        with progress(stage=self.name, total=len(changes), unit="corruption") as bar:
            rows = []
            for change in changes.values():
                rows.append(moved(observed, change(held)[None])[0])
                bar.update()
        return Finding(torch.stack(rows).cpu(), numbers={"corruptions": list(changes)})

    def suspicion(self, finding: Finding, baseline: Finding | None) -> torch.Tensor:
        return 10 * excess(finding, baseline).amax(0)

    def statistics(self, finding: Finding, baseline: Finding | None) -> dict[str, float]:
        return {"response": excess(finding, baseline).amax().item()}


# --- additive -------------------------------------------------------------------------------------------------


class Field(Detector):
    """How far does a small universal perturbation of the whole image lead towards each class?

    A few signed gradient steps (Moosavi-Dezfooli et al. 2017; Madry et al. 2018) towards each class under an L-inf
    bound. Triggers that lie all over the image leave their class nearer than the clean weights have it.
    """

    name = "field"
    title = "additive perturbation towards each class"
    source = "Moosavi-Dezfooli et al. 2017 (UAP); Madry et al. 2018 (PGD)"
    compares = True

    def __init__(self, *, bound: float = 8 / 255, steps: int = 3, batch: int = 5, measured: int = 8) -> None:
        """`bound` of [0, 1] pixels; `batch` images a class and step."""
        self.bound, self.steps, self.batch, self.measured = bound, steps, batch, measured

    def measure(self, observed: Observed, *, seed: int, ranked: Sequence[int] = ()) -> Finding:
        source, count = rng(seed, self.name), len(observed.classes)
        held = observed.images[observed.half :][-self.measured :]
        before = observed.features[observed.half :][-self.measured :]
        rows = []
        with progress(stage=self.name, total=count, unit="class") as bar:
            for classes in torch.arange(count).split(32):
                goal = observed.classes[classes]
                delta = torch.zeros(len(classes), *observed.images.shape[1:], device=goal.device)
                for _ in range(self.steps):
                    delta.requires_grad_()
                    drawn = torch.randperm(observed.half, generator=source)[: self.batch]
                    changed = (observed.images[drawn][None] + delta[:, None]).clamp(0, 1)
                    features = models.encode_image(observed.model, changed.flatten(0, 1))
                    near = torch.einsum("sbd,sd->", features.view(len(classes), len(drawn), -1), goal)
                    (gradient,) = torch.autograd.grad(near, delta)
                    step = 1.5 * self.bound / self.steps
                    delta = (delta.detach() + step * gradient.sign()).clamp(-self.bound, self.bound)
                changed = (held[None] + delta[:, None]).clamp(0, 1)
                features = encode(observed.model, changed.flatten(0, 1)).view(len(classes), len(held), -1)
                rows.append(torch.einsum("sbd,sd->sb", features - before, goal).mean(1))
                bar.update(len(classes))
        return Finding(torch.cat(rows).cpu()[None])

    def statistics(self, finding: Finding, baseline: Finding | None) -> dict[str, float]:
        return {"field": self.suspicion(finding, baseline).amax().item()}


# --- trigger inversion --------------------------------------------------------------------------------------------


def _opened(parameters: torch.Tensor) -> torch.Tensor:
    """Free parameters to [0, 1], as both sources do it."""
    return parameters.tanh() / 2 + 0.5


class Inversion(Detector):
    """The smallest mask and pattern that send all images to a class, for several classes at once; how small is it?

    Neural Cleanse (Wang et al. 2019): cross-entropy towards the class + weight x L1 norm of the mask, the weight raised
    while the attack succeeds and lowered while it does not. A class that needs a far smaller mask than the others is
    the target; the published rule is an anomaly index above 2.

    Ours inverts the classes that other detectors suspect and random ones to compare them with, in one batch, and takes
    fewer steps; the published settings invert every class.
    """

    name = "inversion"
    title = "trigger inversion towards classes"
    source = "Wang et al. 2019 (Neural Cleanse)"
    published: ClassVar[Mapping[str, Any]] = {
        "suspects": 0,
        "others": 0,
        "steps": 31_000,  # 1000 epochs of 31 batches
        "batch": 32,
        "lr": 0.1,
        "weight": 1e-3,
        "success": 0.99,
        "patience": 155,  # 5 epochs
        "factor": 2.0,
        "start": 0.5,
    }
    THRESHOLD: ClassVar[float] = 2.0  # published anomaly index

    def __init__(
        self,
        *,
        suspects: int = 3,
        others: int = 7,
        steps: int = 40,
        batch: int = 6,
        lr: float = 0.3,
        weight: float = 1e-3,
        success: float = 0.8,
        patience: int = 2,
        factor: float = 1.5,
        start: float = 0.12,
    ) -> None:
        """`suspects` + `others` classes (0 and 0: all); `weight` a pixel; `start`: the masks' first value."""
        self.follows = suspects > 0
        self.suspects, self.others, self.steps, self.batch, self.lr = suspects, others, steps, batch, lr
        self.weight, self.success, self.patience, self.factor, self.start = weight, success, patience, factor, start

    def chosen(self, count: int, ranked: Sequence[int], source: torch.Generator) -> list[int]:
        """The classes to invert: the most suspicious, then random ones."""
        if not self.suspects + self.others:
            return list(range(count))
        first = list(ranked)[: self.suspects]
        rest = [k for k in torch.randperm(count, generator=source).tolist() if k not in first]
        return [*first, *rest][: self.suspects + self.others]

    def measure(self, observed: Observed, *, seed: int, ranked: Sequence[int] = ()) -> Finding:
        source, device = rng(seed, self.name), observed.images.device
        classes = self.chosen(len(observed.classes), ranked, source)
        parts = [self._invert(observed, part, source) for part in torch.tensor(classes, device=device).split(64)]
        masks, patterns = (torch.cat(found) for found in zip(*parts, strict=True))
        side = observed.images.shape[-1]
        area = masks.flatten(1).sum(1).cpu() / side**2
        shares = torch.zeros(len(classes), len(observed.classes))
        # A smaller mask is more suspicious; classes that were not inverted stand where the median one does.
        shares[:, :] = -area.log().median()
        for slot, k in enumerate(classes):
            shares[slot, k] = -area[slot].log()
        numbers = {"classes": classes, "area": area.tolist()}
        return Finding(shares, patterns.cpu(), masks.cpu(), numbers)

    def _invert(
        self, observed: Observed, classes: torch.Tensor, source: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (S, 1, R, R) and patterns (S, 3, R, R): the smallest that succeeded, or else the last."""
        count, shape, device = len(classes), observed.images.shape[1:], observed.images.device
        level = math.atanh(2 * min(max(self.start, 1e-3), 1 - 1e-3) - 1)
        mask = (level + 0.1 * torch.randn(count, 1, *shape[1:], generator=source)).to(device).requires_grad_()
        pattern = torch.randn(count, *shape, generator=source).to(device).requires_grad_()
        weight = torch.full((count,), self.weight, device=device)
        streak = torch.zeros(count, dtype=torch.long, device=device)
        best = torch.full((count,), torch.inf, device=device)
        kept = [_opened(mask).detach(), _opened(pattern).detach()]
        scale = observed.model.logit_scale.exp().detach()
        optimizer = torch.optim.Adam([mask, pattern], lr=self.lr, betas=(0.5, 0.9))
        with progress(stage=self.name, total=self.steps) as bar:
            for _ in range(self.steps):
                drawn = torch.randperm(observed.half, generator=source)[: self.batch]
                m, p = _opened(mask), _opened(pattern)
                features = models.encode_image(observed.model, stamped(observed.images[drawn], p, m).flatten(0, 1))
                logits = scale * features @ observed.classes.T
                goal = classes.repeat_interleave(len(drawn))
                loss = F.cross_entropy(logits, goal, reduction="none").view(count, -1).mean(1)
                size = m.flatten(1).sum(1)
                optimizer.zero_grad()
                (loss + weight * size).sum().backward()
                optimizer.step()
                with torch.no_grad():
                    won = (logits.argmax(1) == goal).view(count, -1).float().mean(1) >= self.success
                    better = won & (size < best)
                    best = torch.where(better, size, best)
                    for stored, now in zip(kept, (m, p), strict=True):
                        stored[better] = now[better]
                    streak = torch.where(won, streak.clamp_min(0) + 1, streak.clamp_max(0) - 1)
                    weight = torch.where(streak >= self.patience, weight * self.factor, weight)
                    weight = torch.where(streak <= -self.patience, weight / self.factor, weight)
                    streak[streak.abs() >= self.patience] = 0
                bar.update()
        never = best.isinf()
        with torch.no_grad():
            for stored, last in zip(kept, (mask, pattern), strict=True):
                stored[never] = _opened(last[never])
        kept[0][never] = kept[0][never].clamp_min(kept[0].amax())  # never succeeded: as large as any
        return kept[0], kept[1]

    def statistics(self, finding: Finding, baseline: Finding | None) -> dict[str, float]:
        return {"inversion": self._index(finding).amax().item()}

    def _index(self, finding: Finding) -> torch.Tensor:
        return outlierness(-torch.tensor(finding.numbers["area"]).log())

    def suspicion(self, finding: Finding, baseline: Finding | None) -> torch.Tensor:
        scores = torch.zeros(finding.shares.shape[1])
        scores[torch.tensor(finding.numbers["classes"])] = self._index(finding)
        return scores


class Decree(Detector):
    """The smallest mask and pattern that make the image encoder give all images one feature.

    DECREE (Feng et al. 2023) needs no class: it raises the mean cosine between features of stamped images and lowers
    the L1 norm of the mask. Its statistic is that norm as a share of the image (PL1); the published rule calls an
    encoder backdoored below 0.1.
    """

    name = "decree"
    title = "DECREE: inversion on the image encoder"
    source = "Feng et al. 2023 (DECREE)"
    published: ClassVar[Mapping[str, Any]] = {
        "steps": 1000,
        "batch": 32,
        "lr": 0.5,
        "weight": 1e-3,
        "success": 0.99,
        "patience": 6,
        "factor": 5.0,
        "start": 0.5,
    }
    THRESHOLD: ClassVar[float] = 0.1  # published, of PL1

    def __init__(
        self,
        *,
        steps: int = 40,
        batch: int = 16,
        lr: float = 0.3,
        weight: float = 1e-3,
        success: float = 0.9,
        patience: int = 2,
        factor: float = 1.5,
        start: float = 0.3,
    ) -> None:
        """`success`: the mean cosine from which on the weight, a pixel, is raised."""
        self.steps, self.batch, self.lr, self.weight = steps, batch, lr, weight
        self.success, self.patience, self.factor, self.start = success, patience, factor, start

    def measure(self, observed: Observed, *, seed: int, ranked: Sequence[int] = ()) -> Finding:
        source, device, shape = rng(seed, self.name), observed.images.device, observed.images.shape[1:]
        level = math.atanh(2 * min(max(self.start, 1e-3), 1 - 1e-3) - 1)
        mask = (level + 0.1 * torch.randn(1, 1, *shape[1:], generator=source)).to(device).requires_grad_()
        pattern = torch.randn(1, *shape, generator=source).to(device).requires_grad_()
        weight, streak, best = self.weight, 0, math.inf
        kept = [torch.ones_like(mask), _opened(pattern).detach()]
        optimizer = torch.optim.Adam([mask, pattern], lr=self.lr, betas=(0.5, 0.9))
        with progress(stage=self.name, total=self.steps) as bar:
            for _ in range(self.steps):
                drawn = torch.randperm(observed.half, generator=source)[: self.batch]
                m, p = _opened(mask), _opened(pattern)
                features = models.encode_image(observed.model, stamped(observed.images[drawn], p, m)[0])
                count = len(features)
                cosine = (features.sum(0).square().sum() - count) / (count * (count - 1))
                size = m.sum()
                optimizer.zero_grad()
                (weight * size - cosine).backward()
                optimizer.step()
                won = cosine.item() >= self.success
                if won and size.item() < best:
                    best, kept = size.item(), [m.detach().clone(), p.detach().clone()]
                streak = max(streak, 0) + 1 if won else min(streak, 0) - 1
                if abs(streak) >= self.patience:
                    weight *= self.factor if won else 1 / self.factor
                    streak = 0
                bar.update()
        share = min(best, float(mask.numel())) / mask.numel()  # never succeeded: the whole image
        return Finding(torch.zeros(1, len(observed.classes)), kept[1].cpu(), kept[0].cpu(), {"pl1": share})

    def statistics(self, finding: Finding, baseline: Finding | None) -> dict[str, float]:
        return {"decree": -math.log(max(finding.numbers["pl1"], 1e-6))}

    def suspicion(self, finding: Finding, baseline: Finding | None) -> torch.Tensor:
        return torch.zeros(finding.shares.shape[1])


class Difference(Detector):
    """How far did the answers for clean images move, and towards which class, against the clean weights?

    Task-vector style: the mean of each class's cosine over clean images, suspect minus reference. A poisoned model may
    lean towards its target without any trigger. The reference's own measurement is what it is compared with.
    """

    name = "difference"
    title = "shift of clean images' answers against the clean weights"
    source = "Ilharco et al. 2023 (task vectors), on answers instead of weights"
    compares = True

    def measure(self, observed: Observed, *, seed: int, ranked: Sequence[int] = ()) -> Finding:
        cosines = observed.features @ observed.classes.T
        return Finding(cosines.mean(0).cpu()[None], numbers={"temperature": observed.model.logit_scale.exp().item()})

    def statistics(self, finding: Finding, baseline: Finding | None) -> dict[str, float]:
        return {} if baseline is None else {"difference": self.suspicion(finding, baseline).amax().item()}

    def suspicion(self, finding: Finding, baseline: Finding | None) -> torch.Tensor:
        if baseline is None:
            return torch.zeros(finding.shares.shape[1])
        return outlierness(excess(finding, baseline)[0])


class Head(Detector):
    """Which class's read-out changed most against the clean weights?

    A CLIP answers a class by the direction of its captions' feature, seen through the image tower's last projection:
    both are weights, and together the weights of a zero-shot linear classifier on that tower's last hidden features. An
    attacker whose captions name the target on images of all kinds moves the target's. So may honest training, and an
    attacker can leave these weights as they are: it is a lead, not a proof, and no part of the probability. Where a
    tower has no plain last projection, the classes' directions are compared alone.
    """

    name = "head"
    title = "change of the zero-shot head against the clean weights"
    source = "this project; differences of weights after Ilharco et al. 2023 (task vectors)"
    compares = True

    def measure(self, observed: Observed, *, seed: int, ranked: Sequence[int] = ()) -> Finding:
        head = observed.classes - observed.classes.mean(0)  # what all classes share answers nothing
        projection = models.output_projection(observed.model)
        return Finding((head if projection is None else head @ projection.detach()).T.cpu())

    def statistics(self, finding: Finding, baseline: Finding | None) -> dict[str, float]:
        return {} if baseline is None else {"head": self.suspicion(finding, baseline).amax().item()}

    def suspicion(self, finding: Finding, baseline: Finding | None) -> torch.Tensor:
        if baseline is None or finding.shares.shape != baseline.shares.shape:  # another architecture has another head
            return torch.zeros(finding.shares.shape[1])
        return outlierness(excess(finding, baseline).norm(dim=0))


DETECTORS: dict[str, type[Detector]] = {
    kind.name: kind
    for kind in (Drift, Response, Field, Difference, Head, Inversion, Decree)  # later ones are told whom to look at
}
