"""Codes and rows: a person hears the same in whichever row they sit."""

import pytest
import torch
from moshi.quantization.core_vq import EuclideanCodebook

from moshi_patch.serving.engine.nearest import same_codes_in_every_row
from tests.support.rows import Person, assert_same, converse, frames, load, make_rows


@pytest.mark.slow
@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_person_hears_the_same_in_whichever_row_they_sit(ttt_repo, count):
    """Two centroids of nearly the same distance were told apart in one row of two or three, and not in the other."""
    rows = make_rows(ttt_repo, count)
    first, *others = people = [Person(frames(end=45), row) for row in range(count)]
    converse(rows, *people)
    for other in others:
        assert_same(other.hears, first.hears)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_the_nearest_centroid_is_stocks_and_the_same_in_every_row(stock_repo, rows):
    mimi, _ = load(stock_repo, torch.float32)
    codebooks = [module for module in mimi.modules() if isinstance(module, EuclideanCodebook)]
    generator = torch.Generator().manual_seed(0)
    width = codebooks[0].embedding.shape[1]
    vectors = torch.randn(50, width, generator=generator)
    expected = [codebook._quantize(vectors.double()) for codebook in (book.double() for book in codebooks)]
    mimi.float()
    same_codes_in_every_row(mimi)
    assert len(codebooks) > 3
    for codebook, codes in zip(codebooks, expected, strict=True):
        assert torch.equal(codebook._quantize(vectors), codes)
        for vector, code in zip(vectors[:5], codes, strict=False):
            assert codebook._quantize(vector.expand(rows, -1)).tolist() == [int(code)] * rows
