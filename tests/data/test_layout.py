import ml_dtypes
import numpy as np

from idlora_jax.data import layout
from idlora_jax.types import AV

BF16 = ml_dtypes.bfloat16


def test_video_latents_are_stored_channels_first_with_their_latent_sizes():
    latents = np.arange(3 * 2 * 4 * 8, dtype=np.float32).reshape(3, 2, 4, 8)
    file = layout.video_file(latents, 25.0)
    assert file["latents"].shape == (8, 3, 2, 4) and file["latents"].dtype == BF16
    assert file["latents"][5, 2, 1, 3] == latents[2, 1, 3, 5].astype(BF16)
    sizes = [int(file[name]) for name in ("num_frames", "height", "width")]
    assert sizes == [3, 2, 4] and float(file["fps"]) == 25.0


def test_audio_latents_are_stored_channels_first_in_float32():
    latents = np.random.default_rng(0).normal(size=(17, 16, 8)).astype(np.float32)
    file = layout.sound_file(latents)
    np.testing.assert_array_equal(file["latents"], latents.transpose(2, 0, 1))
    assert (int(file["num_time_steps"]), int(file["frequency_bins"])) == (17, 16)
    np.testing.assert_allclose(file["duration"], 0.68, rtol=1e-6)


def test_conditions_have_one_feature_or_one_a_modality():
    features = AV(np.ones((4, 6), np.float32), np.ones((4, 3), np.float32))
    mask = np.array([False, True, True, True])
    shared = layout.condition_file(features, mask, shared=True)
    assert set(shared) == {"prompt_embeds", "prompt_attention_mask"}
    assert shared["prompt_embeds"].dtype == BF16
    assert shared["prompt_attention_mask"].tolist() == [0, 1, 1, 1]
    assert shared["prompt_attention_mask"].dtype == np.int64
    apart = layout.condition_file(features, mask, shared=False)
    assert apart["video_prompt_embeds"].shape == (4, 6)
    assert apart["audio_prompt_embeds"].shape == (4, 3)


def test_a_clips_files_share_its_relative_name(tmp_path):
    path = layout.file_of(tmp_path, "latents", "anna/1.v2")
    assert path == tmp_path / "latents" / "anna" / "1.v2.safetensors"
