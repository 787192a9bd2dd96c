"""Patterns on images: pasted, added, blended, in one pass with normalising; and images warped."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from conftest import FRESH, Guards, guarded, runs_here, start_python
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from abd_core.kernels import perturb as perturb_module
from abd_core.kernels import perturb_triton
from abd_core.kernels.perturb import add, blend, paste, perturb, warp

H, W = 9, 11


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(FRESH + seed), dtype=torch.float64)


IMAGES, PATCH = draw(4, 3, H, W), draw(3, 2, 5, seed=1)
TOP, LEFT = torch.tensor([0, 7, 3, 3]), torch.tensor([0, 6, 2, 2])  # both corners, and two at one place


def pasted(images: torch.Tensor, patch: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """By slices, image by image."""
    result = images.clone()
    _, h, w = patch.shape
    for i, (y, x) in enumerate(zip(top.tolist(), left.tolist(), strict=True)):
        result[i, :, y : y + h, x : x + w] = patch
    return result


def test_a_patch_goes_to_each_image_s_own_place_and_changes_nothing_else():
    before = IMAGES.clone()
    assert torch.equal(paste(IMAGES, PATCH, TOP, LEFT), pasted(IMAGES, PATCH, TOP, LEFT))
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize("shape", [(1, 1), (H, W), (1, W)])
def test_any_patch_that_fits_is_pasted(shape: tuple[int, int]):
    patch, corner = draw(3, *shape, seed=2), torch.zeros(4, dtype=torch.long)
    assert torch.equal(paste(IMAGES, patch, corner, corner), pasted(IMAGES, patch, corner, corner))


def test_the_gradient_of_a_patch_is_the_sum_of_the_images_gradients_at_its_places():
    images, patch = IMAGES.clone().requires_grad_(), PATCH.clone().requires_grad_()
    output = draw(4, 3, H, W, seed=3)
    (paste(images, patch, TOP, LEFT) * output).sum().backward()
    windows = [output[i, :, y : y + 2, x : x + 5] for i, (y, x) in enumerate(zip(TOP, LEFT, strict=True))]
    torch.testing.assert_close(patch.grad, torch.stack(windows).sum(0))
    hidden = pasted(torch.ones_like(IMAGES), torch.zeros_like(PATCH), TOP, LEFT)
    torch.testing.assert_close(images.grad, output * hidden)


@pytest.mark.parametrize(("top", "left"), [(-1, 0), (0, -1), (H - 1, 0), (0, W - 4)])
def test_a_patch_that_leaves_its_image_is_refused(top: int, left: int):
    tops, lefts = torch.tensor([0, 0, top, 0]), torch.tensor([0, 0, left, 0])
    with pytest.raises(ValueError, match="a 2x5 pattern leaves its 9x11 image"):
        paste(IMAGES, PATCH, tops, lefts)


def test_a_patch_larger_than_the_image_is_refused():
    zero = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(1, 3, 10, 3\) patterns for \(4, 3, 9, 11\) images"):
        paste(IMAGES, draw(3, H + 1, 3), zero, zero)


def test_a_patch_of_another_precision_takes_the_images():
    images = IMAGES.float()
    assert paste(images, PATCH, TOP, LEFT).dtype == torch.float32


def test_addition_is_clamped_to_zero_and_one():
    delta = 4 * draw(3, H, W, seed=4) - 2
    expected = torch.tensor([min(1, max(0, x)) for x in (IMAGES + delta).flatten().tolist()], dtype=torch.float64)
    assert torch.equal(add(IMAGES, delta).flatten(), expected)


def test_the_gradient_of_an_addition_passes_where_nothing_is_clamped():
    delta = (4 * draw(3, H, W, seed=4) - 2).requires_grad_()
    output = draw(4, 3, H, W, seed=5)
    (add(IMAGES, delta) * output).sum().backward()
    inside = ((IMAGES + delta > 0) & (IMAGES + delta < 1)).double()
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(delta.grad, (output * inside.detach()).sum(0))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_a_blend_is_the_convex_combination(alpha: float):
    pattern = draw(3, H, W, seed=6)
    torch.testing.assert_close(blend(IMAGES, pattern, alpha), (1 - alpha) * IMAGES + alpha * pattern)


def test_the_gradient_of_a_blend_is_shared_out_by_its_weight():
    images, pattern = IMAGES.clone().requires_grad_(), draw(3, H, W, seed=6).requires_grad_()
    blend(images, pattern, 0.2).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(IMAGES, 0.8))
    torch.testing.assert_close(pattern.grad, torch.full_like(pattern, 4 * 0.2))


def test_a_warp_by_whole_pixels_moves_the_image_and_repeats_its_border():
    flow = torch.stack([torch.full((H, W), 2.0), torch.full((H, W), -3.0)]).double()
    rows = [max(y - 3, 0) for y in range(H)]
    columns = [min(x + 2, W - 1) for x in range(W)]
    torch.testing.assert_close(warp(IMAGES, flow), IMAGES[:, :, rows][:, :, :, columns])


def test_a_warp_by_half_a_pixel_is_the_mean_of_two():
    flow = torch.stack([torch.full((H, W), 0.5), torch.zeros(H, W)]).double()
    expected = (IMAGES[..., :-1] + IMAGES[..., 1:]) / 2
    torch.testing.assert_close(warp(IMAGES, flow)[..., :-1], expected)


def test_the_gradient_of_a_warp_is_right_in_the_images_and_in_the_flow():
    images = draw(1, 1, 4, 5).requires_grad_()
    flow = (0.2 + 0.2 * draw(2, 4, 5, seed=7)).requires_grad_()  # off the whole pixels, where it has kinks
    assert torch.autograd.gradcheck(warp, (images, flow))


def test_an_image_of_one_pixel_stays_what_it_is():
    assert torch.equal(warp(draw(2, 3, 1, 1), torch.ones(2, 1, 1)), draw(2, 3, 1, 1))


# --- the general form, in both implementations (Triton's kernels run interpreted where there is no GPU) ---------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN_STD = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
KINDS = {
    "nothing": {"count": 0},
    "a patch": {"count": 1, "shape": (2, 5), "keep": 0.0, "gain": 1.0},
    "a field": {"count": 1, "shape": (H, W), "keep": 1.0, "gain": 1.0},
    "one of three windows": {"count": 3, "shape": (4, 3), "keep": (0.0, 1.0, 0.7), "gain": (1.0, 2.0, 0.3)},
    "one of two fields": {"count": 2, "shape": (H, W), "keep": (1.0, 0.5), "gain": (-1.0, 0.5)},
}


@pytest.fixture(params=["torch", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    return runs_here(request.param)


def arguments(kind: str, dtype: torch.dtype = torch.float32, batch: int = 7) -> tuple[torch.Tensor, dict]:
    """Images a little outside of [0, 1], unless they are bytes, and what is to be done to them.

    The values lie on grids that are never painted to just 0 or 1, where float32 and float64 may differ.
    """
    given = KINDS[kind]
    images = (64 * (1.4 * draw(batch, 3, H, W) - 0.2)).round() / 64 + 1 / 192
    images = (255 * images.clamp(0, 1)).byte() if dtype == torch.uint8 else images.to(dtype)
    if not given["count"]:
        return images.to(DEVICE), {}
    count, (h, w) = given["count"], given["shape"]
    generator = torch.Generator().manual_seed(FRESH + 5)
    settings = {
        "patterns": ((64 * (2 * draw(count, 3, h, w, seed=1) - 1)).round() / 64 + 1 / 128).to(DEVICE, torch.float32),
        "top": torch.randint(H - h + 1, (batch,), generator=generator),
        "left": torch.randint(W - w + 1, (batch,), generator=generator),
    }
    if count == 1:
        settings |= {"keep": given["keep"], "gain": given["gain"]}
    else:
        settings |= {name: torch.tensor(given[name]) for name in ("keep", "gain")}
        settings["choice"] = torch.randint(-1, count, (batch,), generator=generator)
    return images.to(DEVICE), settings


def painted(images: torch.Tensor, settings: dict) -> torch.Tensor:
    """Image by image, in float64 (differentiable)."""
    rows = []
    for i, image in enumerate(images.double() / 255 if images.dtype == torch.uint8 else images.double()):
        if "patterns" in settings:
            patterns, choice = settings["patterns"].double(), int(settings.get("choice", torch.zeros(99))[i])
            keep, gain = (torch.as_tensor(settings[name]).double().flatten() for name in ("keep", "gain"))
            if choice >= 0:
                (h, w), top, left = patterns.shape[2:], int(settings["top"][i]), int(settings["left"][i])
                around = (left, image.shape[2] - w - left, top, image.shape[1] - h - top)
                inside = F.pad(torch.ones(h, w), around).bool().to(DEVICE)
                pattern = F.pad(patterns[choice], around)
                k, g = keep[min(choice, len(keep) - 1)], gain[min(choice, len(gain) - 1)]
                image = torch.where(inside, k.to(DEVICE) * image + g.to(DEVICE) * pattern, image)
        rows.append(image)
    mean, std = (torch.tensor(values, device=DEVICE, dtype=torch.float64).view(3, 1, 1) for values in MEAN_STD)
    return (torch.stack(rows).clamp(0, 1) - mean) / std


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("formats", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_one_pass_paints_clamps_normalises_and_casts(
    kind: str, dtype: torch.dtype, formats: tuple[bool, bool], impl: str
):
    images, settings = arguments(kind, dtype)
    wanted = painted(images, settings)
    source = images.contiguous(memory_format=torch.channels_last) if formats[0] else images
    for out in (None, torch.bfloat16):
        got = perturb(source, **settings, normalise=MEAN_STD, dtype=out, channels_last=formats[1], impl=impl)
        assert got.dtype == (out or (torch.float32 if dtype == torch.uint8 else dtype))
        assert got.is_contiguous(memory_format=torch.channels_last if formats[1] else torch.contiguous_format)
        error = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[got.dtype]
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("formats", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("batch", [37, 7, 1])
def test_the_gradients_are_those_of_the_plain_composition(kind: str, formats: tuple[bool, bool], batch: int, impl: str):
    images, settings = arguments(kind, batch=batch)
    leaves = {"images": images.contiguous(memory_format=torch.channels_last) if formats[0] else images}
    leaves |= {"patterns": settings["patterns"]} if "patterns" in settings else {}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    settings |= {name: leaf for name, leaf in leaves.items() if name == "patterns"}
    output = draw(batch, 3, H, W, seed=8).to(DEVICE)
    got = perturb(leaves["images"], **settings, normalise=MEAN_STD, channels_last=formats[1], impl=impl)
    ours = torch.autograd.grad((got * output).sum(), [*leaves.values()])
    alone = (painted(leaves["images"], settings) * output).sum()  # of no pattern, where the only image has none
    theirs = torch.autograd.grad(alone, [*leaves.values()], allow_unused=True, materialize_grads=True)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind]["count"]])
def test_programs_that_share_a_batch_add_up_all_of_it(kind: str, programs: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(perturb_triton, "PROGRAMS", programs * KINDS[kind]["count"])
    images, settings = arguments(kind, batch=37)
    patterns = settings.pop("patterns").requires_grad_()
    output = draw(37, 3, H, W, seed=8).to(DEVICE, torch.float32)

    def gradient(impl: str) -> torch.Tensor:
        return torch.autograd.grad(perturb(images, patterns, **settings, impl=impl), patterns, output)[0]

    got = gradient(runs_here("triton"))
    torch.testing.assert_close(got, gradient("torch"), rtol=1e-5, atol=1e-5)
    assert got.untyped_storage().nbytes() == patterns.nbytes


@pytest.mark.parametrize("kind", ["a patch", "a field", "one of three windows"])
def test_gradients_are_those_of_finite_differences(kind: str):
    images, settings = arguments(kind, torch.float64, batch=3)
    leaves = (images.clamp(0.1, 0.9).requires_grad_(), (0.05 * settings.pop("patterns")).double().requires_grad_())

    def call(images: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
        return perturb(images, 0.5 + patterns if kind == "a patch" else patterns, **settings, normalise=MEAN_STD)

    assert torch.autograd.gradcheck(call, leaves)


def test_bytes_have_no_gradient_and_their_pattern_has(impl: str):
    images, settings = arguments("a field", torch.uint8)
    settings["patterns"].requires_grad_()
    perturb(images, **settings, impl=impl).sum().backward()
    value = images.double() / 255 + settings["patterns"].detach()
    wanted = ((value >= 0) & (value <= 1)).sum(0).float()
    torch.testing.assert_close(settings["patterns"].grad[0], wanted)


@pytest.mark.parametrize(("choice", "gradients"), [(-1, [0.0]), (0, [1.0]), (0, [1.0, 0.0]), (1, [0.0, 1.0])])
def test_a_single_image_s_gradient_goes_to_its_own_pattern(choice: int, gradients: list[float], impl: str):
    images = torch.full((1, 3, H, W), 0.5, device=DEVICE)
    patterns = torch.zeros(len(gradients), 3, H, W, device=DEVICE, requires_grad=True)
    perturb(images, patterns, choice=torch.tensor([choice]), keep=1.0, impl=impl).sum().backward()
    wanted = torch.tensor(gradients, device=DEVICE).view(-1, 1, 1, 1).expand_as(patterns)
    assert torch.equal(patterns.grad, wanted)


def test_no_pattern_is_as_good_as_none(impl: str):
    images, _ = arguments("nothing")
    images.requires_grad_()
    none = torch.zeros(0, 3, 2, 2, device=DEVICE, requires_grad=True)
    out = perturb(images, none, normalise=MEAN_STD, impl=impl)
    assert torch.equal(out, perturb(images, normalise=MEAN_STD, impl=impl))
    out.sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_none_and_infinities_are_clamped(kind: str, impl: str):
    images, settings = arguments(kind)
    if "choice" in settings:
        settings["choice"][:2] = torch.tensor([0, -1])
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        if "patterns" in settings:
            settings["patterns"][0, i, 0, 0] = value
        if kind in ("nothing", "a field", "one of two fields"):  # a patch may hide it
            images[i, :, -1, -1] = value
    wanted = painted(images, settings)
    assert wanted.isnan().any()
    got = perturb(images, **settings, normalise=MEAN_STD, impl=impl)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-6, equal_nan=True)


def test_the_gradient_passes_at_the_bounds_themselves(impl: str):
    images = torch.tensor([-0.1, 0.0, 1.0, 1.1], device=DEVICE).expand(1, 3, 1, 4).clone().requires_grad_()
    perturb(images, impl=impl).sum().backward()
    assert images.grad[0, 0, 0].tolist() == [0, 1, 1, 0]


def test_the_same_inputs_give_the_same_bits(impl: str):
    def once() -> list[torch.Tensor]:
        images, settings = arguments("one of three windows", batch=40)
        settings["patterns"].requires_grad_()
        out = perturb(images, **settings, normalise=MEAN_STD, impl=impl)
        out.square().sum().backward()
        return [out.detach(), settings["patterns"].grad]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("formats", [(False, False), (True, False), (False, True)], ids=str)
def test_nothing_beyond_images_patterns_and_results_is_read_or_written(
    kind: str, dtype: torch.dtype, formats: tuple[bool, bool], impl: str
):
    images, settings = arguments(kind, dtype)
    images = images.contiguous(memory_format=torch.channels_last) if formats[0] else images
    patterns = settings.pop("patterns", None)
    output = draw(7, 3, H, W, seed=8).to(DEVICE, torch.float16)
    output = output.contiguous(memory_format=torch.channels_last) if formats[1] else output

    def run(fill: float) -> list[torch.Tensor]:
        """The result and its gradients, with bytes of this value around images that are bytes."""
        leaves = [guarded(images, fill)] if dtype == torch.uint8 else [guarded(images).requires_grad_()]
        leaves += [] if patterns is None else [guarded(patterns).requires_grad_()]
        with Guards() as guards:
            out = perturb(*leaves, **settings, dtype=torch.float16, channels_last=formats[1], impl=impl)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = torch.autograd.grad(out, wanted, guarded(output)) if wanted else ()
        assert guards.untouched()
        return [out, *found]

    first, second = run(0), run(255)
    assert all(torch.isfinite(a).all() and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_numbers_that_are_kept_from_inference_are_good_for_gradients(impl: str):
    images, settings = arguments("a field")
    settings |= {"keep": FRESH / 2**31, "gain": 0.4}  # that no other test has kept
    with torch.inference_mode():
        before = perturb(images, **settings, impl=impl)
    settings["patterns"].requires_grad_()
    after = perturb(images, **settings, impl=impl)
    after.sum().backward()
    assert torch.equal(before, after) and settings["patterns"].grad.abs().sum() > 0


def test_numbers_of_a_call_without_values_are_not_kept():
    settings = {"keep": FRESH / 2**30, "gain": 0.4}  # that no other test has kept
    with FakeTensorMode(), contextlib.suppress(DataDependentOutputException):
        perturb(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8), **settings, impl="torch")
    out = perturb(torch.zeros(2, 3, 8, 8), torch.ones(1, 3, 8, 8), **settings, impl="torch")
    assert torch.equal(out, torch.full_like(out, 0.4))


def test_an_empty_batch_stays_empty_and_gives_no_gradient(impl: str):
    images, settings = arguments("a field", batch=0)
    settings["patterns"].requires_grad_()
    out = perturb(images, **settings, impl=impl)
    assert out.shape == images.shape
    out.sum().backward()
    assert torch.equal(settings["patterns"].grad, torch.zeros_like(settings["patterns"]))


def test_it_is_an_operator_that_compiles_without_a_break(impl: str):
    images, settings = arguments("one of three windows")
    patterns = settings.pop("patterns").requires_grad_()

    def call(images: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
        return perturb(images, patterns, keep=0.5, **{n: settings[n] for n in ("choice", "top", "left")}, impl=impl)

    places = torch.stack([settings[name] for name in ("choice", "top", "left")]).to(DEVICE)
    weights = torch.rand(2, 3, device=DEVICE)
    given = (images.requires_grad_(), patterns, places, weights, *map(list, MEAN_STD), torch.float32, True, impl)
    torch.library.opcheck(perturb_module._op, given)
    for source in (images, images.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()):
        back = (torch.ones_like(images), source, patterns, places, weights, list(MEAN_STD[1]), [True, True], impl)
        torch.library.opcheck(perturb_module._backward_op, back, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(images, patterns), call(images, patterns))


BAD = {
    "no batch": (lambda x: perturb(x[0]), r"\(B, C, H, W\) of floats or uint8 expected, not \(3, 9, 11\)"),
    "integers": (lambda x: perturb(x.long()), "not .* torch.int64"),
    "which": (lambda x: perturb(x, x[:2]), "which of 2 patterns goes to which image"),
    "choice": (lambda x: perturb(x, x[:2], choice=torch.full((4,), 2)), "choices from -1 to 1 expected"),
    "choices": (lambda x: perturb(x, x[:2], choice=torch.zeros(3)), r"a place for each of 4 expected, not \(3,\)"),
    "weights": (lambda x: perturb(x, x[:1], keep=torch.ones(2)), r"a weight for each of 1 expected, not \(2,\)"),
    "channels": (lambda x: perturb(x, x[:1, :2]), r"\(1, 2, 9, 11\) patterns for \(4, 3, 9, 11\) images"),
    "mean": (lambda x: perturb(x, normalise=((0.5,), (0.5,))), "mean and standard deviation of 3 channels"),
    "impl": (lambda x: perturb(x, impl="cuda"), "impl = 'cuda': 'auto', 'torch' or 'triton' expected"),
    "float64": (lambda x: perturb(x, impl="triton"), "has no float64; 'torch' has"),
    "gray": (lambda x: perturb(x[:, :1].float(), impl="triton"), "needs 3 channels, not 1; 'torch' takes any"),
}


@pytest.mark.parametrize("width", [40, 44])
def test_a_window_is_right_wherever_it_lies_in_an_image_of_many_blocks(width: int, impl: str):
    corners = torch.cartesian_prod(torch.tensor([0, 7, 8, 11, 25]), torch.tensor([0, 3, width - 5]))
    images = draw(len(corners), 3, 30, width).to(DEVICE, torch.float32).requires_grad_()
    patterns = draw(1, 3, 5, 5, seed=1).to(DEVICE, torch.float32).requires_grad_()
    settings = {"patterns": patterns, "top": corners[:, 0], "left": corners[:, 1], "keep": 0.5, "gain": 0.5}
    output = draw(*images.shape, seed=2).to(DEVICE)
    for channels_last in (False, True):
        got = perturb(images, **settings, normalise=MEAN_STD, channels_last=channels_last, impl=impl)
        wanted = painted(images, settings)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-6)
        mine = torch.autograd.grad(got, [images, patterns], output.float())
        right = torch.autograd.grad(wanted, [images, patterns], output)
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_auto_leaves_images_without_three_channels_to_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(perturb_module, "choose", lambda impl, like: {"auto": "triton"}.get(impl, impl))  # a GPU
    grey, patch = draw(2, 1, H, W).float(), draw(1, 2, 5, seed=1).float()
    assert torch.equal(perturb(grey, patch[None]), perturb(grey, patch[None], impl="torch"))


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_in_one_line(case: str):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(IMAGES)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["a patch", "a field"])
def test_on_a_gpu_a_batch_of_training_s_size_is_right_and_a_hundred_runs_give_the_same_bits(kind: str):
    side, given = 224, KINDS[kind]
    h, w = (side, side) if given["shape"] == (H, W) else (38, 38)
    images = (255 * draw(256, 3, side, side)).byte().to(DEVICE)
    top, left = torch.randint(side - h + 1, (256,)), torch.randint(side - w + 1, (256,))
    patterns = (64 * draw(1, 3, h, w, seed=1)).floor() / 64 + 1 / 128  # as in `arguments`: no sum is just 0 or 1
    patterns = patterns.to(DEVICE, torch.float32).requires_grad_()
    output = draw(256, 3, side, side, seed=2).to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)

    def run(impl: str) -> list[torch.Tensor]:
        weights = {"keep": given["keep"], "gain": given["gain"], "top": top, "left": left}
        form = {"normalise": MEAN_STD, "dtype": torch.bfloat16, "channels_last": True}
        out = perturb(images, patterns, **weights, **form, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, patterns, output)]

    first = run("triton")
    for mine, right in zip(first, run("torch"), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-2, atol=1e-2)
    assert all(torch.equal(a, b) for _ in range(100) for a, b in zip(first, run("triton"), strict=True))


@pytest.mark.gpu
def test_on_a_gpu_there_may_be_more_images_than_an_axis_of_a_grid_has_programs():
    images = draw(70_000, 3, 4, 4).to(DEVICE, torch.float32).requires_grad_()
    pattern = draw(1, 3, 4, 4, seed=1).to(DEVICE, torch.float32).requires_grad_()

    def run(impl: str) -> list[torch.Tensor]:
        out = perturb(images, pattern, keep=0.5, gain=0.5, impl=impl)
        return [out.detach(), *torch.autograd.grad(out.sum(), [images, pattern])]

    for mine, right in zip(run("triton"), run("torch"), strict=True):
        torch.testing.assert_close(mine, right)


COMPILE = """
import itertools, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from abd_core.kernels import perturb_triton as kernels

CONSTANTS = {"AREA": 224 * 224, "WIDTH": 224, "MEAN": (0.5, 0.25, 0.2), "FACTOR": (2.0, 4.0, 5.0)}
more = {kernels._forward_kernel: kernels.REGISTERS, kernels._images_kernel: {}, kernels._patterns_kernel: {}}
for kernel, last, whole in itertools.product(more, (True, False), (True, False)):
    names = kernel.arg_names
    byte = "UNIT" in names and last  # the gradient of bytes is not asked for
    types = dict.fromkeys(["grad", "out"], "*bf16" if last else "*fp32")
    types |= {"images": "*u8" if byte else "*fp32", "patterns": "*fp32", "weights": "*fp32", "places": "*i64"}
    types |= dict.fromkeys(["batch", "count", "h", "w", "each"], "i32")
    fixed = {name: last for name in names if name.endswith("_LAST")} | {"IMAGES_LAST": False}
    fixed |= CONSTANTS | {"WHOLE": whole, "PAINT": True, "UNIT": 1 / 255 if byte else 1.0, "GROUPS": kernels.GROUPS}
    fixed = {(names.index(name),): value for name, value in fixed.items() if name in names}
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(kernel, signature, fixed, aligned)
    for capability in (80, 90):
        options = {"num_warps": kernels.NUM_WARPS, **more[kernel]}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(made.asm["cubin"])
            tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
            told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
        assert "REG" in told, told
        if kernel is kernels._forward_kernel and byte and whole:  # of windows, few blocks may have to
            assert " STACK:0 SHARED:0 " in told, told
        print(kernel.__name__, last, whole, capability)
"""


@pytest.mark.slow
def test_kernels_compile_for_gpus_and_a_covering_pattern_s_neither_spills_nor_takes_shared_memory():
    child = start_python(COMPILE, TRITON_INTERPRET="0")
    out, err = child.communicate(timeout=600)
    assert child.returncode == 0, err
    assert len(out.splitlines()) == 24
