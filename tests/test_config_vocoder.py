import pytest
from codec_sections import LTX_2, LTX_2_3, TINY_VOCODER, TINY_VOCODER_23

from idlora_jax.config_vocoder import vocoder_config


def read(section):
    return vocoder_config({"vocoder": section})


def with_bwe(**changes):
    return {**TINY_VOCODER_23, "bwe": {**TINY_VOCODER_23["bwe"], **changes}}


def test_the_published_vocoder_of_2_0_is_one_generator():
    cfg = vocoder_config(LTX_2)
    assert (cfg.sample_rate, cfg.factor, cfg.mel_bins) == (24000, 240, 64)
    assert cfg.extension is None
    assert cfg.generator.rates == (6, 5, 2, 2, 2)
    assert (cfg.generator.activation, cfg.generator.bound) == ("leaky", "tanh")
    assert cfg.generator.bias


def test_the_published_vocoder_of_2_3_is_two_generators():
    cfg = vocoder_config(LTX_2_3)
    assert (cfg.sample_rate, cfg.factor, cfg.mel_bins) == (48000, 480, 64)
    first, after = cfg.generator, cfg.extension
    assert (first.width, first.factor, first.bound) == (1536, 160, "clamp")
    assert (after.generator.width, after.generator.bound) == (512, "none")
    assert (after.n_fft, after.hop, after.input_rate, after.ratio) == (
        512,
        80,
        16000,
        3,
    )
    assert {first.activation, after.generator.activation} == {"snakebeta"}
    assert not first.bias and not after.generator.bias


def test_the_sample_rate_is_24_khz_unless_the_file_says_otherwise():
    assert read(TINY_VOCODER).sample_rate == 24000
    for key in ("output_sample_rate", "output_sampling_rate"):
        assert read(TINY_VOCODER | {key: 16000}).sample_rate == 16000


def test_the_pieces_vary_one_by_one():
    plain = read(TINY_VOCODER).generator
    clamped = read(TINY_VOCODER | {"use_tanh_at_final": False}).generator
    assert (plain.bound, clamped.bound) == ("tanh", "clamp")
    free = read(TINY_VOCODER | {"apply_final_activation": False}).generator
    assert free.bound == "none"
    assert not read(TINY_VOCODER | {"use_bias_at_final": False}).generator.bias
    snakes = TINY_VOCODER | {"resblock": "AMP1"}
    assert read(snakes).generator.activation == "snake"
    named = read(snakes | {"activation": "snakebeta"}).generator
    assert named.activation == "snakebeta"


def test_the_bands_of_the_second_generator_are_those_of_its_spectrogram():
    cfg = read(with_bwe(num_mels=10))
    assert (cfg.mel_bins, cfg.extension.generator.mel_bins) == (64, 10)


def test_configurations_are_hashable():
    assert hash(read(TINY_VOCODER_23)) == hash(read(dict(TINY_VOCODER_23)))


NO_FFT = {k: v for k, v in TINY_VOCODER_23["bwe"].items() if k != "n_fft"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"resblock": "2"}, r"resblock = '2' is not supported, .* \['1', 'AMP1'\]"),
        ({"stereo": False}, "stereo = False is not supported"),
        ({"upsample_rates": [2]}, "upsample_kernel_sizes has 5 entries, expected 1"),
        ({"resblock": "AMP1", "activation": "elu"}, "activation = 'elu' is not"),
        ({"bwe": TINY_VOCODER_23["bwe"]}, r"no 'vocoder' section, got \['bwe'\]"),
        (TINY_VOCODER_23 | {"bwe": NO_FFT}, r"vocoder\.bwe .*also \['n_fft'\]"),
        (with_bwe(win_size=8), "win_size = 8 is not supported, expected 16"),
        (with_bwe(output_sampling_rate=40000), "expected a whole ratio"),
        (with_bwe(hop_length=5), "rates whose product is hop x ratio"),
        (with_bwe(upsample_kernel_sizes=[15]), "exceed their rates by even numbers"),
    ],
)
def test_a_config_of_another_network_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        read(section)
