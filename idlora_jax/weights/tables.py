"""The rule tables: every key of every supported checkpoint file.

`BASE` covers the single-file LTX checkpoints of both generations, `GEMMA` the text
encoder's folder, `UPSAMPLER` the files of latent upsamplers. Key names:
shared facts section 15; paths are those of `model/`.
"""

from __future__ import annotations

from idlora_jax.weights.rules import Rule, conv, linear, scales

_DIT = "model.diffusion_model."


def _attention(torch: str, flax: str) -> tuple[Rule, ...]:
    names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}
    names["to_gate_logits"] = "gate"
    dense = [r for t, f in names.items() for r in linear(f"{torch}.{t}", f"{flax}/{f}")]
    norms = (
        Rule(f"{torch}.{n}.weight", f"{flax}/{n}/scale") for n in ("q_norm", "k_norm")
    )
    return (*dense, *norms)


def _mlp(torch: str, first: str, second: str, flax: str) -> tuple[Rule, ...]:
    up = linear(f"{torch}.{first}", f"{flax}/up")
    return (*up, *linear(f"{torch}.{second}", f"{flax}/down"))


def _norm(torch: str, flax: str) -> tuple[Rule, ...]:
    scale = Rule(f"{torch}.weight", f"{flax}/scale")
    return scale, Rule(f"{torch}.bias", f"{flax}/bias")


def _adaln(torch: str, flax: str) -> tuple[Rule, ...]:
    embed = _mlp(f"{torch}.emb.timestep_embedder", "linear_1", "linear_2", flax)
    return (*embed, *linear(f"{torch}.linear", f"{flax}/out"))


def _transformer_half(name: str, a: str, cross: str, gate: str) -> tuple[Rule, ...]:
    """One modality: `a` is the prefix of its keys, `cross` the attention it reads."""
    layer, ours = f"{_DIT}transformer_blocks.{{L}}.", f"transformer/blocks/{name}/"
    ends, top = _DIT, f"transformer/{name}/"
    tables = {
        f"{a}scale_shift_table": "table",
        f"scale_shift_table_a2v_ca_{name}": "cross_table",
        f"{a}prompt_scale_shift_table": "prompt_table",
    }
    return (
        *_attention(f"{layer}{a}attn1", f"{ours}self_attn"),
        *_attention(f"{layer}{a}attn2", f"{ours}text_attn"),
        *_attention(f"{layer}{cross}", f"{ours}cross_attn"),
        *_mlp(f"{layer}{a}ff.net", "0.proj", "2", f"{ours}ff"),
        *(Rule(layer + torch, ours + flax) for torch, flax in tables.items()),
        *linear(f"{ends}{a}patchify_proj", f"{top}patchify"),
        *_mlp(f"{ends}{a}caption_projection", "linear_1", "linear_2", f"{top}caption"),
        *_adaln(f"{ends}{a}adaln_single", f"{top}ada"),
        *_adaln(f"{ends}{a}prompt_adaln_single", f"{top}prompt_ada"),
        *_adaln(f"{ends}av_ca_{name}_scale_shift_adaln_single", f"{top}cross_ada"),
        *_adaln(f"{ends}av_ca_{gate}_gate_adaln_single", f"{top}cross_gate"),
        Rule(f"{ends}{a}scale_shift_table", f"{top}table"),
        *linear(f"{ends}{a}proj_out", f"{top}out"),
    )


TRANSFORMER: tuple[Rule, ...] = (
    *_transformer_half("video", "", "audio_to_video_attn", "a2v"),
    *_transformer_half("audio", "audio_", "video_to_audio_attn", "v2a"),
)


def _connector(name: str) -> tuple[Rule, ...]:
    torch, flax = f"{_DIT}{name}_embeddings_connector.", f"text_connector/{name}/"
    layer, blocks = f"{torch}transformer_1d_blocks.{{L}}.", f"{flax}blocks/"
    projection = f"text_embedding_projection.{name}_aggregate_embed"
    return (
        Rule(f"{torch}learnable_registers", f"{flax}registers"),
        *_attention(f"{layer}attn1", f"{blocks}attn"),
        *_mlp(f"{layer}ff.net", "0.proj", "2", f"{blocks}ff"),
        *linear(projection, f"text_connector/projection/{name}"),
    )


TEXT_CONNECTOR: tuple[Rule, ...] = (
    *_connector("video"),
    *_connector("audio"),
    *linear(
        "text_embedding_projection.aggregate_embed",
        "text_connector/projection/shared",
        bias=False,
    ),
)


def _conv3d(torch: str, flax: str) -> tuple[Rule, ...]:
    return conv(f"vae.{torch}.conv", f"video_vae/{flax}")


def _video_residual(torch: str, flax: str) -> tuple[Rule, ...]:
    """One residual block of the video VAE, with all it can have."""
    theirs, ours = f"vae.{torch}", f"video_vae/{flax}"
    return (
        *_conv3d(f"{torch}.conv{{k}}", f"{flax}/conv{{k}}"),
        *_norm(f"{theirs}.norm{{k}}", f"{ours}/norm{{k}}"),
        *conv(f"{theirs}.conv_shortcut", f"{ours}/shortcut"),
        Rule(f"{theirs}.per_channel_scale{{k}}", f"{ours}/noise_scale{{k}}", "conv"),
        Rule(f"{theirs}.scale_shift_table", f"{ours}/table"),
    )


def _video_time(torch: str, flax: str) -> tuple[Rule, ...]:
    embedder = f"vae.{torch}.timestep_embedder"
    return _mlp(embedder, "linear_1", "linear_2", f"video_vae/{flax}")


def _video_half(side: str, way: str) -> tuple[Rule, ...]:
    blocks, ours = f"{side}.{way}_blocks.{{i}}", f"{side}/blocks_{{i}}"
    return (
        *_conv3d(f"{side}.conv_in", f"{side}/conv_in"),
        *_video_residual(f"{blocks}.res_blocks.{{j}}", f"{ours}/res_{{j}}"),
        *_video_residual(blocks, ours),
        *_conv3d(f"{blocks}.conv", f"{ours}/conv"),
        *_norm(f"vae.{side}.conv_norm_out", f"video_vae/{side}/norm_out"),
        *_conv3d(f"{side}.conv_out", f"{side}/conv_out"),
    )


_VIDEO_STRIDED = conv(
    "vae.encoder.down_blocks.{i}.conv", "video_vae/encoder/blocks_{i}/strided"
)
_VIDEO_TIMESTEP = (
    *_video_time("decoder.up_blocks.{i}.time_embedder", "decoder/blocks_{i}/time"),
    *_video_time("decoder.last_time_embedder", "decoder/time"),
    Rule("vae.decoder.last_scale_shift_table", "video_vae/decoder/table"),
    Rule("vae.decoder.timestep_scale_multiplier", "video_vae/decoder/timestep_scale"),
)


def _statistics(torch: str, flax: str, names: tuple[str, ...]) -> tuple[Rule, ...]:
    ours = {"mean-of-means": "mean", "std-of-means": "std"}
    return tuple(
        Rule(
            f"{torch}.per_channel_statistics.{name}",
            f"{flax}/stats/{ours.get(name, name.replace('-', '_'))}",
        )
        for name in names
    )


_USED = ("mean-of-means", "std-of-means")
_UNUSED = ("mean-of-stds", "mean-of-stds_over_std-of-means", "channel")

VIDEO_VAE: tuple[Rule, ...] = (
    *_video_half("encoder", "down"),
    *_video_half("decoder", "up"),
    *_VIDEO_STRIDED,
    *_VIDEO_TIMESTEP,
    *_statistics("vae", "video_vae", _USED + _UNUSED),
)


def _audio_half(side: str, way: str, resample: str) -> tuple[Rule, ...]:
    torch, flax = f"audio_vae.{side}", f"audio_vae/{side}"
    level, ours = f"{torch}.{way}.{{i}}", f"{flax}/{way}_{{i}}"
    attention = {"q": "q", "k": "k", "v": "v", "proj_out": "out"}
    convs = {
        f"{torch}.conv_in.conv": f"{flax}/conv_in",
        f"{level}.block.{{j}}.conv{{k}}.conv": f"{ours}/res_{{j}}/conv{{k}}",
        f"{level}.block.{{j}}.nin_shortcut.conv": f"{ours}/res_{{j}}/shortcut",
        f"{level}.{resample}": f"{ours}/resample",
        f"{torch}.mid.block_{{j}}.conv{{k}}.conv": f"{flax}/mid/res_{{j}}/conv{{k}}",
        f"{torch}.conv_out.conv": f"{flax}/conv_out",
    }
    for name, own in attention.items():
        convs[f"{level}.attn.{{j}}.{name}"] = f"{ours}/attn_{{j}}/{own}"
        convs[f"{torch}.mid.attn_{{j}}.{name}"] = f"{flax}/mid/attn_{{j}}/{own}"
    return tuple(rule for pair in convs.items() for rule in conv(*pair))


AUDIO_VAE: tuple[Rule, ...] = (
    *_audio_half("encoder", "down", "downsample.conv"),
    *_audio_half("decoder", "up", "upsample.conv.conv"),
    *_statistics("audio_vae", "audio_vae", _USED),
)


def _snake(torch: str, flax: str) -> tuple[Rule, ...]:
    filters = {"upsample": "up", "downsample.lowpass": "down"}
    return (
        *(Rule(f"{torch}.act.{n}", f"{flax}/{n}") for n in ("alpha", "beta")),
        *(
            Rule(f"{torch}.{t}.filter", f"{flax}/{f}_filter", "conv")
            for t, f in filters.items()
        ),
    )


def _generator(torch: str, flax: str) -> tuple[Rule, ...]:
    block, ours = f"{torch}resblocks.{{i}}", f"{flax}res_{{i}}"
    return (
        *conv(f"{torch}conv_pre", f"{flax}conv_in"),
        Rule(f"{torch}ups.{{i}}.weight", f"{flax}up_{{i}}/kernel", "conv_transpose"),
        Rule(f"{torch}ups.{{i}}.bias", f"{flax}up_{{i}}/bias"),
        *conv(f"{block}.convs1.{{j}}", f"{ours}/dilated_{{j}}"),
        *conv(f"{block}.convs2.{{j}}", f"{ours}/plain_{{j}}"),
        *_snake(f"{block}.acts1.{{j}}", f"{ours}/dilated_{{j}}_act"),
        *_snake(f"{block}.acts2.{{j}}", f"{ours}/plain_{{j}}_act"),
        *_snake(f"{torch}act_post", f"{flax}act_out"),
        *conv(f"{torch}conv_post", f"{flax}conv_out"),
    )


_STFT = "vocoder.mel_stft."

VOCODER: tuple[Rule, ...] = (
    *_generator("vocoder.", "vocoder/"),
    *_generator("vocoder.vocoder.", "vocoder/base/"),
    *_generator("vocoder.bwe_generator.", "vocoder/bwe/"),
    Rule(f"{_STFT}stft_fn.forward_basis", "vocoder/stft/forward", "conv"),
    Rule(f"{_STFT}stft_fn.inverse_basis", "vocoder/stft/inverse", "conv"),
    Rule(f"{_STFT}mel_basis", "vocoder/stft/mel", "linear"),
)

GEMMA_IGNORED = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "lm_head.",
    "language_model.lm_head.",
)
"""Prefixes of keys in a Gemma folder that are not ours: the published model also reads
images and predicts words, the text encoder does not."""


def _gemma() -> tuple[Rule, ...]:
    torch, flax = "language_model.model.", "text_encoder/"
    layer, ours = f"{torch}layers.{{L}}.", f"{flax}layers/"
    dense = {f"self_attn.{n}_proj": f"attn/{n}" for n in "qkv"}
    dense["self_attn.o_proj"] = "attn/out"
    dense |= {f"mlp.{n}_proj": f"mlp/{n}" for n in ("gate", "up", "down")}
    norms = {
        "self_attn.q_norm": "attn/q_norm",
        "self_attn.k_norm": "attn/k_norm",
        "input_layernorm": "attn_pre",
        "post_attention_layernorm": "attn_post",
        "pre_feedforward_layernorm": "mlp_pre",
        "post_feedforward_layernorm": "mlp_post",
    }
    return (
        Rule(f"{torch}embed_tokens.weight", f"{flax}embed/embedding"),
        *(r for t, f in dense.items() for r in linear(layer + t, ours + f, bias=False)),
        *(Rule(f"{layer}{t}.weight", f"{ours}{f}/scale") for t, f in norms.items()),
        Rule(f"{torch}norm.weight", f"{flax}norm/scale"),
    )


GEMMA: tuple[Rule, ...] = _gemma()


def _upsampler_blocks(torch: str, flax: str) -> tuple[Rule, ...]:
    layer, ours = f"{torch}.{{i}}", f"{flax}_{{i}}"
    return (
        *conv(f"{layer}.conv{{k}}", f"{ours}/conv{{k}}"),
        *_norm(f"{layer}.norm{{k}}", f"{ours}/norm{{k}}"),
    )


UPSAMPLER: tuple[Rule, ...] = (
    *conv("initial_conv", "upsampler/conv_in"),
    *_norm("initial_norm", "upsampler/norm_in"),
    *_upsampler_blocks("res_blocks", "upsampler/before"),
    *conv("upsampler.0", "upsampler/shuffle"),
    *conv("upsampler.conv", "upsampler/rational/conv"),
    Rule("upsampler.blur_down.kernel", "upsampler/rational/blur/kernel", "conv"),
    *_upsampler_blocks("post_upsample_res_blocks", "upsampler/after"),
    *conv("final_conv", "upsampler/conv_out"),
)

BASE = TRANSFORMER + TEXT_CONNECTOR + VIDEO_VAE + AUDIO_VAE + VOCODER

SCALES: tuple[Rule, ...] = scales(BASE)
"""Of Linears in 8 bits; which ones are, differs between checkpoints (see `fp8`)."""
