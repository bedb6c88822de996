"""What a person says has the same codes in whichever row they sit."""

import pytest
import torch
from moshi.quantization.core_vq import EuclideanCodebook

from moshi_patch.serving.engine.nearest import same_codes_in_every_row
from tests.support.rows import load


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_a_code_is_that_of_the_nearest_centroid_and_the_same_in_every_row(stock_repo, rows):
    """The tiny Mimi has centroids that float32 cannot tell apart: then either is right, but the same one everywhere."""
    mimi, _ = load(stock_repo, torch.float32)
    same_codes_in_every_row(mimi)
    codebooks = [module for module in mimi.modules() if isinstance(module, EuclideanCodebook)]
    vectors = torch.randn(50, codebooks[0].embedding.shape[1], generator=torch.Generator().manual_seed(0))
    assert len(codebooks) > 3
    for codebook in codebooks:
        distances = (vectors.double()[:, None] - codebook.embedding.double()).norm(dim=-1)
        codes = codebook._quantize(vectors)
        chosen = distances.gather(1, codes[:, None])[:, 0]
        torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-6, atol=0)
        assert len(codes.unique()) > 10
        for vector, code in zip(vectors, codes, strict=True):
            assert codebook._quantize(vector.expand(rows, -1)).tolist() == [int(code)] * rows
