"""Data: a file is as long as it plays, whatever its header says; what cannot be read says why, and what to do."""

import wave

import numpy as np
import pytest
import sphn

from finetune.data.audio import BLOCK_SAMPLES, AudioFile, durations
from finetune.data.broken import BrokenItem
from finetune.data.segments import Segment
from finetune.evaluation.published.audio import read_mono
from tests.support.audio_files import RATE, UNKNOWN, noise, write_adpcm, write_endless_flac, write_wav
from tests.support.datasets import make_tokenizer, write_dataset

PIPED = pytest.mark.parametrize("unknown", [UNKNOWN, 0x7FFF_FFFF, 0x7FFF_F000], ids=hex)


@PIPED
def test_a_wav_from_a_pipe_is_as_long_as_it_plays(tmp_path, codec, unknown):
    write_dataset(tmp_path, 1)
    path, pcm = tmp_path / "train0.wav", noise(20)
    write_wav(path, pcm, data=unknown, riff=unknown + 36 if unknown < UNKNOWN - 36 else UNKNOWN)
    audio = AudioFile(path)
    assert (audio.duration, durations([path])) == (1.6, [1.6])
    assert np.array_equal(np.concatenate(list(audio.blocks()), 1), pcm)
    assert not audio.is_cut_off(1.6)
    tokenizer = make_tokenizer(codec, 0.8)
    assert (tokenizer(Segment(path, 10)).codes[0, 1:] >= 0).all()
    with pytest.raises(BrokenItem, match=rf"WAV header says {unknown} bytes of audio, and 307200 follow.*list the sec"):
        tokenizer(Segment(path, 20))


@PIPED
def test_a_mono_wav_from_a_pipe_is_not_cut_off(tmp_path, unknown):
    write_wav(tmp_path / "a.wav", noise(20, channels=1), data=unknown, riff=UNKNOWN)
    for seconds in (None, 1.0, 100.0):
        assert len(read_mono(tmp_path / "a.wav", RATE, seconds)) == min(seconds or 1.6, 1.6) * RATE


@pytest.mark.parametrize(("data", "riff"), [(0, None), (0, 0), (0, UNKNOWN), (UNKNOWN, None), (100, None)])
def test_a_wav_whose_header_hides_audio_says_what_to_do(tmp_path, codec, data, riff):
    write_dataset(tmp_path, 1)
    write_wav(tmp_path / "train0.wav", noise(20), data=data, riff=riff)
    named = rf"its WAV header says {data} bytes of audio, and 307200 follow.*`ffmpeg -i train0\.wav new\.wav`"
    with pytest.raises(BrokenItem, match=named):
        make_tokenizer(codec, 0.8)(Segment(tmp_path / "train0.wav", 10))


def test_a_wav_with_something_behind_its_audio_is_as_long_as_its_header_says(tmp_path):
    write_wav(tmp_path / "a.wav", noise(4))
    with (tmp_path / "a.wav").open("ab") as file:
        file.write(b"LIST\x04\x00\x00\x00INFO")
    audio = AudioFile(tmp_path / "a.wav")
    assert (audio.doubt, audio.duration) == (None, 0.32)


def test_a_flac_from_a_pipe_says_what_to_do(tmp_path):
    write_endless_flac(tmp_path / "a.flac")
    with pytest.raises(ValueError, match=r"FLAC header does not say how long it is.*`ffmpeg -i a\.flac new\.wav`"):
        AudioFile(tmp_path / "a.flac")


def test_a_codec_that_cannot_be_read_from_the_middle_says_what_to_do(tmp_path, codec):
    write_dataset(tmp_path, 1)
    write_adpcm(tmp_path / "train0.wav", 3)
    tokenizer = make_tokenizer(codec, 1.6)
    assert tokenizer(Segment(tmp_path / "train0.wav", 0))
    with pytest.raises(BrokenItem, match=r"this codec cannot be read from the middle; convert it.*ffmpeg"):
        tokenizer(Segment(tmp_path / "train0.wav", 20))


def test_a_file_without_any_of_its_audio_is_damaged_and_not_of_a_rare_codec(tmp_path, codec):
    write_dataset(tmp_path, 1)
    write_endless_flac(tmp_path / "a.flac")
    header = bytearray((tmp_path / "a.flac").read_bytes())
    header[21:26] = (48_000).to_bytes(5, "big")  # samples that it says it has
    header[21] |= 0xF0
    (tmp_path / "train0.wav").write_bytes(header)
    with pytest.raises(BrokenItem, match=r"train0\.wav from step 0: (cannot be read \(end of stream\)|no audio)"):
        make_tokenizer(codec, 0.8)(Segment(tmp_path / "train0.wav", 0))


def test_other_files_can_be_read_from_the_middle(tmp_path):
    write_wav(tmp_path / "a.wav", noise(20))
    write_wav(tmp_path / "short.wav", noise(1))
    assert AudioFile(tmp_path / "a.wav").can_seek()
    assert AudioFile(tmp_path / "short.wav").can_seek()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e12])
@pytest.mark.parametrize("channel", [0, 1])
def test_samples_that_are_no_sound_are_a_broken_item(tmp_path, codec, value, channel):
    write_dataset(tmp_path, 1)
    pcm = noise(20)
    pcm[channel, 12 * 1920 + 5] = value
    write_wav(tmp_path / "train0.wav", pcm)
    tokenizer = make_tokenizer(codec, 0.8)
    assert tokenizer(Segment(tmp_path / "train0.wav", 0))  # the other half is sound
    with pytest.raises(
        BrokenItem, match=r"train0\.wav from step 10: samples (that are not finite, the first|up to 1e)"
    ):
        tokenizer(Segment(tmp_path / "train0.wav", 10))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e12])
def test_samples_that_are_no_sound_are_a_broken_recording_of_the_published_benchmarks(tmp_path, value):
    pcm = noise(20, channels=1)
    pcm[0, 100] = value
    write_wav(tmp_path / "a.wav", pcm)
    with pytest.raises(BrokenItem, match=r"a\.wav: samples"):
        read_mono(tmp_path / "a.wav", RATE)


@pytest.mark.parametrize(("samples", "rate"), [(1, RATE), (2, 192_000)])
def test_a_recording_of_no_length_at_mimis_rate_is_broken(tmp_path, samples, rate):
    sphn.write_wav(str(tmp_path / "a.wav"), np.zeros((1, samples), "f"), rate)
    with pytest.raises(BrokenItem, match="no audio"):
        read_mono(tmp_path / "a.wav", RATE)


def test_a_long_file_is_read_in_blocks(tmp_path):
    number = BLOCK_SAMPLES // 8000 * 8000 + 1000
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.arange(number).astype("<i2").tobytes())
    blocks = list(AudioFile(tmp_path / "long.wav").blocks())
    assert [block.shape[1] for block in blocks] == [number - 1000, 1000]
    ramp = (np.concatenate(blocks, 1)[0] * 32768).astype("<i2")
    assert (np.diff(ramp) == 1).all()  # nothing is lost, or heard twice, where blocks meet
