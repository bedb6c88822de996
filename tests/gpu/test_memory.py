"""On a GPU: a memory is read by the CUDA graph that was captured before it was loaded, and moves between devices."""

import pytest
import torch
from moshi.models.lm import LMGen

import moshi_patch
from moshi_patch.memory import fast_weight_tensors
from tests.gpu.test_cuda import CUDA, ttt_model
from tests.support.models import TTT, random_codes, tiny_model

pytestmark = pytest.mark.usefixtures("patched")
STEPS = 43


def hear(lm_gen: LMGen, codes: torch.Tensor) -> None:
    for t in range(codes.shape[2]):
        lm_gen.step(codes[:, 3:, t : t + 1])


def test_a_replayed_graph_goes_on_with_a_loaded_memory_as_with_one_that_stayed(tmp_path):
    model = ttt_model()
    codes = random_codes(model, 1, 2 * STEPS).cuda()
    lm_gen = LMGen(model, use_sampling=False)
    with lm_gen.streaming(1):
        hear(lm_gen, codes[:, :, :STEPS])
        assert lm_gen._streaming_state.graphed_main._graph is not None
        kept = {key: tensor.clone() for key, tensor in fast_weight_tensors(model).items()}
        moshi_patch.save_memory(model, tmp_path / "memory")
        lm_gen.reset_streaming()
        moshi_patch.load_memory(model, tmp_path / "memory")
        hear(lm_gen, codes[:, :, STEPS:])
        resumed = {key: tensor.clone() for key, tensor in fast_weight_tensors(model).items()}
        lm_gen.reset_streaming()
        for key, tensor in fast_weight_tensors(model).items():
            tensor.copy_(kept[key])
        hear(lm_gen, codes[:, :, STEPS:])
        assert [
            key for key, tensor in fast_weight_tensors(model).items() if not torch.equal(tensor, resumed[key])
        ] == []
        assert [layer["updates"] for layer in moshi_patch.ttt_stats(model).values()] == [[2 * STEPS // 5]] * 2


def test_a_memory_of_the_gpu_is_one_of_the_same_weights_on_the_cpu(tmp_path):
    model = ttt_model()
    twin = tiny_model(torch.float32, **{**TTT, **CUDA, "device": "cpu"})
    twin.load_state_dict(model.state_dict())
    assert moshi_patch.fingerprint(twin) == moshi_patch.fingerprint(model)
    codes = random_codes(model, 1, STEPS).cuda()
    with torch.no_grad(), model.streaming(1), twin.streaming(1):
        for t in range(STEPS):
            model.forward_text(codes[:, :, t : t + 1])
        moshi_patch.save_memory(model, tmp_path / "memory")
        moshi_patch.load_memory(twin, tmp_path / "memory")
        saved = fast_weight_tensors(model)
        assert [
            key for key, tensor in fast_weight_tensors(twin).items() if not torch.equal(tensor, saved[key].cpu())
        ] == []
