"""Batches against torchvision's and PIL's own results."""

import numpy as np
import pytest
import torch
from formats.drawn import photograph
from PIL import Image
from torchvision import transforms
from worstgroup.benchmark import data
from worstgroup.benchmark.data import (
    CROP_AREA,
    CROP_RATIO,
    Joined,
    Pixels,
    Room,
    augment,
    crop_boxes,
    random_order,
    resized_crop,
    stratified,
    weighted,
)
from worstgroup.benchmark.spec import Recipe

CPU = torch.device("cpu")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def draw(n: int, height: int, width: int) -> np.ndarray:
    """Images with every kind of edge: noise, and smooth ramps."""
    images = np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    images[0] = np.linspace(0, 255, width).astype(np.uint8)[None, :, None]
    return images


def pixels(images: np.ndarray, mean: tuple[float, ...] = (0.0,) * 3, std: tuple[float, ...] = (1.0,) * 3) -> Pixels:
    return Pixels(images, np.arange(len(images)), mean, std, CPU)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------- evaluation input


@pytest.mark.parametrize(("mean", "std"), [IMAGENET, ((0.5,) * 3, (0.25,) * 3), ((0.0,) * 3, (1.0,) * 3)])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (17, 31)])
def test_evaluation_batches_are_torchvisions_bits(
    size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    images = draw(20, *size)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = torch.stack([reference(Image.fromarray(image)) for image in images])
    batches = list(pixels(images, mean, std).batches(7))
    assert [len(batch.x) for batch in batches] == [7, 7, 6]
    assert torch.equal(torch.cat([batch.x for batch in batches]), expected)
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(20))


def test_all_256_levels_are_torchvisions_bits() -> None:
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*IMAGENET)])
    assert torch.equal(pixels(images, *IMAGENET).batch(torch.tensor([0])).x[0], reference(Image.fromarray(images[0])))


def test_a_batch_holds_what_was_asked_for_and_leaves_the_store_alone() -> None:
    images = draw(6, 8, 8)
    before = images.copy()
    held = pixels(images, *IMAGENET)
    batch = held.batch(torch.tensor([4, 1, 4]))
    assert batch.y.tolist() == batch.index.tolist() == [4, 1, 4]
    assert torch.equal(batch.x[0], batch.x[2])
    batch.x.zero_()
    assert np.array_equal(images, before)


def test_channels_last_changes_the_layout_and_no_value() -> None:
    images = draw(4, 8, 8)
    index = torch.arange(4)
    plain = pixels(images, *IMAGENET).batch(index).x
    held = Pixels(images, np.arange(4), *IMAGENET, CPU, channels_last=True)
    last = held.batch(index).x
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    assert torch.equal(plain, last)
    for kind in ("flip", "crop+flip"):
        plain, last = (part.batch(index, augment(kind, generator())).x for part in (pixels(images, *IMAGENET), held))
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert plain.is_contiguous()
        assert torch.allclose(plain, last, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_large_images_are_the_same_bits_one_by_one(monkeypatch: pytest.MonkeyPatch, channels_last: bool) -> None:
    images, rows = draw(5, 150, 160), np.array([3, 0, 4, 1])

    def batches() -> list[torch.Tensor]:
        held = Pixels(images, np.arange(4), *IMAGENET, CPU, channels_last, rows)
        joined = Joined([(held, np.array([2])), (held, np.array([0, 3]))])
        assert held._large == joined._large == (data.LARGE <= 150 * 160 * 3)
        return [held.batch(torch.tensor([2, 2, 0])).x, joined.batch(torch.tensor([1, 0])).x]

    one_by_one = batches()
    monkeypatch.setattr(data, "LARGE", 10**9)
    for ours, expected in zip(one_by_one, batches(), strict=True):
        assert torch.equal(ours, expected)
        assert ours.is_contiguous(memory_format=torch.channels_last) is channels_last
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*IMAGENET)])
    assert torch.equal(one_by_one[0][2], reference(Image.fromarray(images[3])))


def test_rows_say_which_image_each_example_is() -> None:
    images, rows = draw(9, 8, 8), np.array([7, 0, 7, 3])
    held = Pixels(images, np.array([1, 0, 1, 0]), *IMAGENET, CPU, rows=rows)
    direct = Pixels(images[rows], np.array([1, 0, 1, 0]), *IMAGENET, CPU)
    assert len(held) == 4
    for index in (torch.tensor([3, 0, 0]), torch.arange(4)):
        ours, expected = held.batch(index), direct.batch(index)
        assert torch.equal(ours.x, expected.x)
        assert torch.equal(ours.y, expected.y)
        assert torch.equal(ours.index, index)  # of the example, not of the image
        assert torch.equal(held.gather(index), direct.gather(index))
    assert torch.equal(
        torch.cat([batch.x for batch in held.batches(3)]), torch.cat([batch.x for batch in direct.batches(3)])
    )


def test_rows_are_moved_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PIECE", 3)
    images, rows = torch.from_numpy(draw(9, 8, 8)), torch.tensor([8, 1, 1, 5, 0, 2, 4])
    assert torch.equal(data._moved(images, rows, CPU), images[rows])
    assert torch.equal(data._moved(images, None, CPU), images)


def test_features_are_not_scaled() -> None:
    features = np.random.default_rng(0).normal(size=(6, 1, 1, 5)).astype(np.float32) * 300
    before = features.copy()
    zero, one = (0.0,) * 5, (1.0,) * 5
    held = Pixels(features, np.arange(6), zero, one, CPU, rows=np.array([5, 2]))
    x = held.batch(torch.tensor([1, 0])).x
    assert x.shape == (2, 5, 1, 1)
    assert np.array_equal(x[:, :, 0, 0].numpy(), features[[2, 5], 0, 0])
    normalised = Pixels(features, np.arange(6), (2.0,) * 5, (4.0,) * 5, CPU).batch(torch.arange(6)).x
    assert np.array_equal(normalised[:, :, 0, 0].numpy(), (features[:, 0, 0] - 2) / 4)
    assert np.array_equal(features, before)


# ------------------------------------------------------------------------------------------------------------- crops


def on_pil(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize(image.shape[1::-1], Image.Resampling.BILINEAR)).astype(np.float32)


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (24, 40)])
def test_resized_crop_is_pils_up_to_its_rounding(size: tuple[int, int]) -> None:
    images = draw(64, *size)
    boxes = crop_boxes(64, *size, generator(3))
    ours = resized_crop(pixels(images).batch(torch.arange(64)).x, *boxes).permute(0, 2, 3, 1).numpy() * 255
    for i, box in enumerate(zip(*(side.int().tolist() for side in boxes), strict=True)):
        assert np.abs(ours[i] - on_pil(images[i], *box)).max() <= 1.01, box


def test_resized_crop_of_photographs_is_pils_up_to_its_rounding() -> None:
    """At the size of the photograph sets; the horizontal pass of PIL rounds to 8 bits before the vertical one."""
    images = np.stack([photograph(224, 224, seed) for seed in range(8)])
    boxes = crop_boxes(8, 224, 224, generator(5))
    ours = resized_crop(pixels(images).batch(torch.arange(8)).x, *boxes).permute(0, 2, 3, 1).numpy() * 255
    theirs = [
        on_pil(image, *box)
        for image, box in zip(images, zip(*(side.int().tolist() for side in boxes), strict=True), strict=True)
    ]
    difference = np.abs(ours - np.stack(theirs))
    assert difference.max() <= 1.01
    assert difference.mean() < 0.35


def test_a_crop_of_everything_changes_nothing() -> None:
    x = torch.rand(3, 3, 12, 20, generator=generator())
    zero, height, width = torch.zeros(3), torch.full((3,), 12.0), torch.full((3,), 20.0)
    assert torch.allclose(resized_crop(x, zero, zero, height, width), x, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (8, 8), (24, 40), (40, 8)])
def test_crop_boxes_are_whole_pixels_inside_the_image(size: tuple[int, int]) -> None:
    top, left, height, width = boxes = crop_boxes(4000, *size, generator())
    assert all(torch.equal(side, side.round()) for side in boxes)
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() <= size[0]
    assert (left + width).max() <= size[1]


@pytest.mark.parametrize("side", [8, 32, 224])
def test_crop_boxes_hold_70_to_100_percent_of_a_square(side: int) -> None:
    _, _, height, width = crop_boxes(4000, side, side, generator())
    share = height * width / side**2
    rounding = 1 / side  # half a pixel on either side
    assert CROP_AREA[0] - rounding <= share.min() < 0.75
    assert 0.95 < share.max() <= CROP_AREA[1]
    ratio = width / height
    assert CROP_RATIO[0] - 2 * rounding <= ratio.min() < 0.85
    assert 1.2 < ratio.max() <= CROP_RATIO[1] + 2 * rounding


def test_crop_boxes_reach_all_four_sides() -> None:
    top, left, height, width = crop_boxes(2000, 32, 32, generator())
    assert bool((top == 0).any())
    assert bool((left == 0).any())
    assert bool(((top + height == 32) & (top > 0)).any())
    assert bool(((left + width == 32) & (left > 0)).any())


# ----------------------------------------------------------------------------------------------------- augmentations


def test_flip_mirrors_about_half_of_the_images() -> None:
    x = torch.rand(1000, 3, 4, 6, generator=generator(1))
    transform = augment("flip", generator())
    assert transform is not None
    out = transform(x)
    flipped = (out == x.flip(3)).flatten(1).all(1)
    kept = (out == x).flatten(1).all(1)
    assert bool((flipped ^ kept).all())
    assert 430 < int(flipped.sum()) < 570


def test_none_is_no_transform() -> None:
    assert augment("none", generator()) is None


@pytest.mark.parametrize("kind", ["flip", "crop+flip"])
def test_a_stream_depends_only_on_its_generator(kind: str) -> None:
    x = torch.rand(16, 3, 8, 8, generator=generator(1))

    def stream(seed: int, noise: int) -> list[torch.Tensor]:
        torch.manual_seed(noise)
        transform = augment(kind, generator(seed))
        assert transform is not None
        before = torch.random.get_rng_state()
        outs = [transform(x) for _ in range(3)]
        assert torch.equal(torch.random.get_rng_state(), before)
        return outs

    first, again, other = stream(0, 1), stream(0, 2), stream(5, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_augmentation_comes_before_normalisation() -> None:
    images = draw(5, 8, 8)
    index = torch.arange(5)
    plain = pixels(images).batch(index, augment("crop+flip", generator())).x
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in IMAGENET)
    normalised = pixels(images, *IMAGENET).batch(index, augment("crop+flip", generator())).x
    assert torch.equal(normalised, (plain - mean) / std)


# ------------------------------------------------------------------------------------------------- room on the device


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What a GPU says of its memory."""
    held = {"free": 1000, "total": 1000, "reserved": 0, "allocated": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (held["free"], held["total"]))
    for name in ("reserved", "allocated"):
        monkeypatch.setattr(torch.cuda, f"memory_{name}", lambda _, name=name: held[name])
    return held


def fit_in(room: Room, memory: dict[str, int], *sizes: int) -> list[bool]:
    """Whether images of each size find room, one after the other, with what was moved before in memory."""
    found = []
    for size in sizes:
        found.append(room.take(size, torch.device("cuda")))
        for name, sign in (("free", -1), ("reserved", 1), ("allocated", 1)):
            memory[name] += sign * size * found[-1]
    return found


def test_all_images_of_a_run_have_one_share_of_the_device_together(memory: dict[str, int]) -> None:
    room = Room()
    assert fit_in(room, memory, 400, 250, 200, 1) == [True, False, True, False]  # 600 of 1000
    assert room.taken == 600


def test_runs_that_share_a_device_divide_it(memory: dict[str, int]) -> None:
    first, second = Room(2), Room(2)
    assert fit_in(first, memory, 301, 300) == [False, True]
    memory |= {"reserved": 0, "allocated": 0}  # the other one's are in another process
    assert fit_in(second, memory, 300, 1) == [True, False]


def test_what_other_programs_have_is_not_to_be_had(memory: dict[str, int]) -> None:
    memory["free"] = 500
    assert fit_in(Room(), memory, 301, 300) == [False, True]


def test_what_an_earlier_run_left_in_torchs_hands_is_free(memory: dict[str, int]) -> None:
    memory |= {"free": 300, "reserved": 700, "allocated": 100}
    assert fit_in(Room(), memory, 541, 540) == [False, True]


# ------------------------------------------------------------------------------------------------------ joined splits


@pytest.mark.parametrize("kind", ["none", "crop+flip"])
def test_joined_pixels_are_those_of_the_parts(kind: str) -> None:
    first, second = pixels(draw(9, 8, 8), *IMAGENET), pixels(draw(6, 8, 8)[::-1].copy(), *IMAGENET)
    rows = np.array([7, 0, 3]), np.array([5, 1])
    joined = Joined([(first, rows[0]), (second, rows[1])])
    assert len(joined) == 5
    assert joined.y.tolist() == [7, 0, 3, 5, 1]
    index = torch.tensor([4, 0, 2, 3, 3, 1])
    parts = [first.batch(torch.tensor(rows[0])).x, second.batch(torch.tensor(rows[1])).x]
    batch = joined.batch(index)
    assert torch.equal(batch.x, torch.cat(parts)[index])
    assert torch.equal(batch.y, joined.y[index])
    assert torch.equal(batch.index, index)  # what an objective looks up lies in the order of the joined images
    whole = pixels(np.concatenate([draw(9, 8, 8)[rows[0]], draw(6, 8, 8)[::-1][rows[1]]]), *IMAGENET)
    transforms_ = [augment(kind, generator()) for _ in range(2)]
    assert torch.equal(joined.batch(index, transforms_[0]).x, whole.batch(index, transforms_[1]).x)
    assert torch.equal(torch.cat([part.x for part in joined.batches(2)]), torch.cat(parts))


def test_joined_pixels_with_rows() -> None:
    images = draw(12, 8, 8)
    first = Pixels(images, np.array([0, 1, 1]), *IMAGENET, CPU, rows=np.array([11, 4, 6]))
    second = Pixels(images, np.array([1, 0]), *IMAGENET, CPU, rows=np.array([2, 9]))
    joined = Joined([(first, np.array([2, 0])), (second, np.array([1, 0]))], labels=(True, False))
    index = torch.tensor([3, 0, 1, 2, 0])
    assert torch.equal(joined.batch(index).x, pixels(images, *IMAGENET).batch(torch.tensor([6, 11, 9, 2])[index]).x)
    assert joined.batch(index).y.tolist() == [-1, 1, 0, -1, 1]
    again = Joined([(joined, np.array([1, 2]))])
    assert torch.equal(again.batch(torch.arange(2)).x, joined.batch(torch.tensor([1, 2])).x)


def test_joined_features_keep_their_type() -> None:
    features = np.random.default_rng(0).normal(size=(6, 1, 1, 5)).astype(np.float32)
    part = Pixels(features, np.arange(6), (0.0,) * 5, (1.0,) * 5, CPU)
    joined = Joined([(part, np.array([4, 1])), (part, np.array([0]))])
    assert np.array_equal(joined.batch(torch.arange(3)).x[:, :, 0, 0].numpy(), features[[4, 1, 0], 0, 0])


# ---------------------------------------------------------------------------------------------------------- samplers


def sizes(n: int, batch_size: int) -> list[int]:
    return [len(part) for part in random_order(n, Recipe(batch_size=batch_size))(generator())]


@pytest.mark.parametrize(
    ("n", "batch_size", "expected"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (8, 4, [4, 4]), (3, 4, [3]), (1, 4, [1]), (5, 2, [2, 3])],
)
def test_a_last_batch_of_one_joins_its_neighbour(n: int, batch_size: int, expected: list[int]) -> None:
    assert sizes(n, batch_size) == expected


def test_random_order_shows_every_example_once() -> None:
    sampler = random_order(101, Recipe(batch_size=16))
    first, again, other = (torch.cat(list(sampler(generator(seed)))) for seed in (0, 0, 1))
    assert first.sort().values.tolist() == list(range(101))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_weighted_draws_in_proportion() -> None:
    weights = torch.tensor([0.0] + [1.0] * 500 + [9.0] * 500)
    sampler = weighted(weights, Recipe(batch_size=64))
    drawn = torch.cat([torch.cat(list(sampler(generator(seed)))) for seed in range(20)])
    assert len(drawn) == 20 * 1001
    assert int((drawn == 0).sum()) == 0
    assert (drawn > 500).float().mean().item() == pytest.approx(0.9, abs=0.01)


def test_equal_weights_are_an_epoch_without_replacement() -> None:
    recipe = Recipe(batch_size=16)
    ours = torch.cat(list(weighted(torch.full((50,), 0.2), recipe)(generator())))
    assert torch.equal(ours, torch.cat(list(random_order(50, recipe)(generator()))))


@pytest.mark.parametrize("draws", [12, 50, 130])
def test_weighted_takes_as_many_draws_as_asked_for(draws: int) -> None:
    drawn = torch.cat(list(weighted(torch.ones(50), Recipe(batch_size=16), draws=draws)(generator())))
    assert len(drawn) == draws
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < 50
    assert (len(drawn.unique()) == draws) == (draws == 50)  # n equal draws are an epoch without replacement


@pytest.mark.parametrize("counts", [(30, 30), (57, 3), (40, 19, 1), (5, 10, 15, 30)])
def test_stratified_batches_hold_equally_many_of_each_stratum(counts: tuple[int, ...]) -> None:
    stratum = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(60)]
    batches = stratified(stratum, Recipe(batch_size=12))(generator())
    assert [len(index) for index in batches] == [12] * 5
    for index in batches:
        assert stratum[index].bincount().tolist() == [12 // len(counts)] * len(counts)


def test_strata_take_turns_where_a_batch_cannot_be_divided() -> None:
    stratum = torch.tensor([0] * 20 + [3] * 5 + [7] * 2)  # labels need not be consecutive
    batches = stratified(stratum, Recipe(batch_size=8))(generator())
    drawn = torch.cat(list(batches))
    assert [int((stratum[drawn] == s).sum()) for s in (0, 3, 7)] == [9, 9, 9]
    for index in batches:
        counts = [int((stratum[index] == s).sum()) for s in (0, 3, 7)]
        assert max(counts) - min(counts) <= 1


def test_stratified_draws_every_image_of_a_stratum_alike() -> None:
    stratum = torch.tensor([0] * 90 + [1] * 10)
    sampler = stratified(stratum, Recipe(batch_size=20))
    drawn = torch.cat([torch.cat(list(sampler(generator(seed)))) for seed in range(100)]).bincount(minlength=100)
    assert drawn[:90].float().mean().item() == pytest.approx(5000 / 90)
    assert drawn[90:].float().mean().item() == pytest.approx(500)
    assert drawn[90:].float().std().item() < 60
    first, again = (torch.cat(list(sampler(generator(3)))) for _ in range(2))
    assert torch.equal(first, again)
