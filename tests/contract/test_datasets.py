"""What every registered dataset must keep: a consistent card, and files that give exactly its counts."""

import pytest
from worstgroup.benchmark.backbones import build_backbone, normalization
from worstgroup.benchmark.errors import MissingData
from worstgroup.benchmark.planning import make_dataset
from worstgroup.benchmark.registry import DATASETS
from worstgroup.benchmark.spec import SPLITS
from worstgroup.benchmark.store import check_counts

CARDS = [card.name for name in DATASETS for card in DATASETS[name].cards.values() if card.classes]
"""Without those whose classes are read from users' own files."""


@pytest.mark.parametrize("name", CARDS)
def test_card_is_consistent(name: str) -> None:
    _, card = make_dataset(name)
    assert card.name == name
    assert set(card.counts) | set(card.sizes) == set(SPLITS)  # what cannot be counted beforehand has a size at least
    for counts in card.counts.values():
        assert len(counts) == card.num_groups == len(card.group_names())
    for attribute in card.attributes:
        assert len(attribute.aligned) == len(card.classes)
        assert max(attribute.aligned) < len(attribute.values)
    assert card.title
    assert card.licence
    assert card.citation
    assert len(card.mean) == len(card.std) == card.image[2]
    model = build_backbone(
        card.backbone, num_classes=len(card.classes), image=card.image[:2], in_channels=card.image[2]
    )
    assert normalization(model, card) == (card.mean, card.std)


@pytest.mark.parametrize("name", CARDS)
def test_files_give_the_counts_of_the_card(name: str) -> None:
    dataset, card = make_dataset(name)
    try:
        splits = dataset.load(None)
    except MissingData as error:
        pytest.skip(f"the files are not here: {error}")
    check_counts(card, splits)
    for split in splits.values():
        assert split.images[:1].shape == (1, *card.image)
        assert len(split.image_rows()) == len(split.y) == len(split.a) == len(split.units())
        assert split.image_rows().max() < len(split.images)
