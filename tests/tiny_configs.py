"""Fields of the configs in tests/tiny_types.py: sizes and options for every type, and what single types need."""

from typing import Any

E, K = 8, 3

SIZES: dict[str, float] = dict(
    # the stack
    vocab_size=96, unpadded_vocab_size=96, hidden_size=64, d_model=64, intermediate_size=48, intermediate_size_mlp=48,
    dense_intermediate_size=48, prefix_dense_intermediate_size=48, ffn_hidden_size=48, d_ff=48,
    num_hidden_layers=4, n_layers=4, num_layers=2, num_decoder_layers=2, encoder_layers=2, decoder_layers=2,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128, max_seq_len=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, num_mtp_layers=0, num_nextn_predict_layers=0,
    hidden_size_per_layer_input=0, max_window_layers=4,
    # experts
    num_experts=E, n_routed_experts=E, num_local_experts=E, moe_num_experts=E, zero_expert_num=4,
    num_experts_per_tok=K, moe_topk=K, top_k_experts=K, moe_k=K, moe_top_k=K, n_group=2, topk_group=1,
    moe_intermediate_size=24, expert_ffn_hidden_size=24, moe_hidden_size=32, router_hidden_size=32,
    shared_expert_intermediate_size=24, shared_intermediate_size=24, moe_shared_expert_intermediate_size=24,
    shared_experts_intermediate_size=24, share_expert_dim=24, first_k_dense_replace=1,
    # attention
    num_attention_heads=4, n_heads=4, num_heads=4, head_dim=16, kv_channels=16, d_kv=16, rotary_dim=8,
    encoder_attention_heads=4, decoder_attention_heads=4, num_sliding_attention_heads=4,
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, qk_head_dim=16, v_head_dim=16,
    o_groups=2, o_lora_rank=16, gated_norm_rank=8, d_rel=8, rel_extent=32,
    sliding_window=6, sliding_window_size=6, attention_chunk_size=6,
    index_head_dim=16, index_topk=4, index_n_heads=2, index_kpool=2, index_block_size=4, index_topk_blocks=1,
    block_size=16,
    # mamba and linear attention
    mamba_n_heads=8, mamba_num_heads=8, mamba_d_head=16, mamba_head_dim=16, mamba_d_state=16, ssm_state_size=16,
    mamba_chunk_size=16, chunk_size=16, mamba_dt_rank=8, n_groups=2, layer_group_size=2,
    linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_head_dim=16, linear_num_heads=4,
    # several residual streams, tables of n-grams
    hc_lowrank=8, hc_sinkhorn_iters=4, n_layers_per_attn_res_block=2, ngram_vocab_size_base=64,
    make_ngram_vocab_size_divisible_by=8, split_ngram_parts=4, ple_embed_dim=16, heads_per_ngram=2,
    # vision and audio towers
    depth=2, out_hidden_size=64, image_size=32, patch_size=8, num_position_embeddings=16, text_hidden_size=64,
    projector_hidden_size=64, projection_hidden_size=64, projection_hidden_dim=64, projection_intermediate_size=64,
    projector_input_dim=64, projector_output_dim=64, mlp_dim=48, output_channels=16, vision_output_dim=64,
    vision_hidden_size=64, adapter_input_size=64, adapter_out_dim=64, downsample_hidden_size=16, output_dim=64,
    thinker_hidden_size=64, decoder_dim=32, codebook_size=32, position_embedding_size=16, audio_hidden_size=64,
    max_source_positions=32, output_proj_dims=64,
)  # fmt: skip

OPTIONS: dict[str, Any] = dict(
    routed_scaling_factor=1.7, route_scale=1.7, router_scaling_factor=1.7, moe_routed_scaling_factor=1.7,
    moe_router_scaling_factor=1.7, norm_topk_prob=True, moe_router_logit_softcapping=2.5,
    embedding_multiplier=1.3, residual_multiplier=0.7, attention_multiplier=0.3, logits_scaling=1.5, logit_scale=0.5,
    full_attn_alpha_factor=1.2, full_attn_beta_factor=0.8, linear_attn_alpha_factor=0.9, linear_attn_beta_factor=1.3,
    mlp_alpha_factor=1.1, mlp_beta_factor=0.7, swiglu_limit=1.5, swiglu_alpha=1.3, mlp_gate_softcap=1.5,
    mlp_up_softcap=2.5, output_multiplier=0.6, final_logit_softcapping=20.0, attention_value_scale=0.8,
    moe_token_dropout=0.3, router_bias=True, hc_magnitude=1.5, logits_mup_width_multiplier=1.5,
)  # fmt: skip

DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]
DENSE_SECOND = ["sparse", "dense", "sparse", "sparse"]
SLIDING_FULL = ["sliding_attention", "full_attention"] * 2
LINEAR_FULL = ["linear_attention", "full_attention"] * 2


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    return dict(rope_type="default", rope_theta=10000.0, mrope_section=list(sections), **more)


_YARN: dict[str, Any] = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
    original_max_position_embeddings=32,
)  # fmt: skip
_NEMOTRON: dict[str, Any] = dict(
    layer_types=["linear_attention", "moe", "full_attention", "mlp", "moe"], moe_latent_size=32, num_hidden_layers=5
)
_GEMMA: dict[str, Any] = dict(
    num_experts=E, top_k_experts=K, moe_intermediate_size=24, global_head_dim=16, final_logit_softcapping=20.0
)

TYPE_FIELDS: dict[str, dict[str, Any]] = {
    "afmoe": dict(layer_types=SLIDING_FULL, mup_enabled=True, num_dense_layers=1),
    "axk2": dict(n_group=2, topk_group=1),
    "beam": dict(layer_types=SLIDING_FULL, mlp_layer_types=["dense", "sparse", "sparse", "dense"]),
    "cohere2_moe": dict(
        num_shared_experts=1, shared_expert_combination_strategy="average", expert_selection_fn="sigmoid",
        layer_types=SLIDING_FULL, mlp_layer_types=DENSE_FIRST,
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=2.0),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=E, moe_top_k=K, moe_normalize_expert_weights=2.0),
    ),
    "deepseek_ocr2_text": dict(num_experts_per_tok=K, mlp_layer_types=DENSE_FIRST),
    "deepseek_v2": dict(num_experts_per_tok=K, topk_method="group_limited_greedy", n_group=2, topk_group=1,
                        first_k_dense_replace=1),
    "deepseek_v4": dict(
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention",
                     "compressed_sparse_attention"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        mlp_layer_types=["hash_moe", "hash_moe", "moe", "moe"],
    ),
    "diffusion_gemma": dict(canvas_length=8),
    "diffusion_gemma_text": dict(_GEMMA, num_hidden_layers=2, layer_types=SLIDING_FULL[:2]),
    "doge": dict(is_moe=True, num_experts=16),
    "dots1": dict(n_routed_experts=E, n_shared_experts=1, num_experts_per_tok=K, first_k_dense_replace=1,
                  layer_types=SLIDING_FULL),
    "dots3_note": dict(image_token_id=92),
    "dots3_note_text": dict(
        swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=16, swa_kv_lora_rank=16,
        swa_head_dim=16, swa_qk_nope_head_dim=8, swa_v_head_dim=16,
    ),
    "dots3_note_vision_encoder": dict(
        num_hidden_layers=2, mlp_layer_types=["dense", "sparse"], adapter_in_dim=64,
        per_layer_config={1: dict(num_local_experts=E, num_experts_per_tok=K)},
    ),
    "ernie4_5_vl_moe": dict(image_token_id=92),
    "ernie4_5_vl_moe_text": dict(moe_intermediate_size=[24, 12], rope_parameters=_mrope(2, 2, 4)),
    "exaone_moe": dict(layer_types=SLIDING_FULL),
    "flint": dict(mlp_only_layers=[1], layer_types=SLIDING_FULL),
    "gemma4_text": dict(_GEMMA, enable_moe_block=True, num_kv_shared_layers=0, layer_types=SLIDING_FULL),
    "glm4v_moe_text": dict(rope_parameters=_mrope(2, 1, 1, partial_rotary_factor=0.5)),
    "glm5_next_text": dict(
        qk_rope_head_dim=0, mlp_layer_types=DENSE_FIRST,
        layer_types=["linear_attention", "indexed_attention"] * 2,
    ),
    "gpt_oss": dict(rope_parameters=_YARN),
    "granitemoe_swa": dict(shared_intermediate_size=24, layer_types=SLIDING_FULL),
    "granitemoehybrid": dict(layer_types=LINEAR_FULL),
    "granitemoeshared": dict(shared_intermediate_size=24),
    "hunyuan_v1_moe": dict(head_dim=16, num_experts=E, moe_topk=K),
    "inkling_text": dict(layer_types=["hybrid_sliding", "hybrid"] * 2, mlp_layer_types=DENSE_FIRST),
    "inkling2_text": dict(layer_types=["hybrid_sliding", "hybrid"] * 2),
    "jamba": dict(attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "kimi_linear": dict(layer_types=LINEAR_FULL),
    "kolibri1": dict(layer_types=SLIDING_FULL),
    "laguna": dict(layer_types=SLIDING_FULL, moe_router_logit_softcapping=2.5),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    "llama4_text": dict(moe_layers=[0, 2, 3]),
    "longcat_flash": dict(head_dim=8),
    "mellum": dict(layer_types=SLIDING_FULL, mlp_layer_types=DENSE_SECOND),
    "glm_moe_dsa": dict(indexer_types=["full", "shared", "full", "shared"]),
    "minimax_m3_vl_text": dict(
        layer_types=["full_attention", "minimax_m3_sparse"] * 2, mlp_layer_types=DENSE_FIRST
    ),
    "mistral_large4_text": dict(indexer_types=["full", "shared"] * 2, kv_source_layers=[0, 1, 1, 3]),
    "mixtral": dict(sliding_window=6),
    "mistral4": dict(first_k_dense_replace=1),
    # It makes about ten times as much of a rounding error as others do: see docs/decisions.md.
    "muse_spark_text": dict(
        num_hidden_layers=3, layer_types=SLIDING_FULL[:3], mlp_layer_types=DENSE_SECOND[:3], post_norm_eps=0.05
    ),
    "nemotron_h": _NEMOTRON,
    "nllb-moe": dict(encoder_sparse_step=2, decoder_sparse_step=2, router_bias=True),
    "phimoe": dict(num_experts_per_tok=2, router_jitter_noise=0.3),
    "qwen2_moe": dict(mlp_only_layers=[1], use_sliding_window=True),
    "qwen3_5_moe_text": dict(
        layer_types=LINEAR_FULL, rope_parameters=_mrope(4, 2, 2, partial_rotary_factor=1.0)
    ),
    "qwen3_moe": dict(mlp_only_layers=[1], use_sliding_window=True),
    "qwen3_next": dict(layer_types=LINEAR_FULL, mlp_only_layers=[1]),
    "qwen3_omni_moe_thinker": dict(vision_start_token_id=93),
    "qwen3_omni_moe_text": dict(rope_parameters=_mrope(4, 2, 2), mlp_only_layers=[1]),
    "qwen3_omni_moe_talker_text": dict(
        shared_expert_intermediate_size=24, head_dim=16, rope_parameters=_mrope(4, 2, 2), mlp_only_layers=[1]
    ),
    "qwen3_vl_moe_text": dict(rope_parameters=_mrope(4, 2, 2), mlp_only_layers=[1]),
    "qwen4_exp_text": dict(
        layer_types=["linear_attention", "indexed_attention"] * 2, indexer_n_heads=2, indexer_kv_heads=1,
        indexer_head_dim=16, indexer_budget=4, indexer_compress_ratio=2, ple_layer_ids=[3], ple_embed_dim=16,
        eos_token_id=2,
    ),
    "step3p5": dict(
        sliding_window=6,
        layer_types=SLIDING_FULL, mlp_layer_types=DENSE_FIRST,
        swiglu_limits=[None, 1.0, None, 0.5], swiglu_limits_shared=[None, None, 0.8, 0.6],
    ),
    "switch_transformers": dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=2),
    "unlimited_ocr_text": dict(num_experts_per_tok=K, topk_method="group_limited_greedy", n_group=2, topk_group=1),
    "zaya": dict(num_experts_per_tok=1, sliding_window=6, layer_types=["hybrid", "hybrid_sliding"] * 2),
    # towers
    "muse_spark_audio": dict(hidden_sizes=(16, 16, 32, 32), depths=(1, 1, 1, 1)),
    "radio": dict(video_temporal_patch_size=2),
    "Qwen3OmniMoeTalkerConfig": dict(spatial_merge_size=2),
    "nemotron3_5_transcribe_word_timestamp": dict(blank_token_id=95),
}  # fmt: skip

KEPT: dict[str, tuple[str, ...]] = {"nemo_speechlm": ("vocab_size",)}
"""Fields of `SIZES` that are left alone in a type, because its own checks tie them to a default."""
