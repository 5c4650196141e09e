"""Models of text that people train: encoders, decoders, translators, experts, state spaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from corpus import calls
from corpus.calls import VOCABULARY
from corpus.tiny import GROUPED, SEQUENCE, TEXT, TWO_SIDED, WORDS, tiny

if TYPE_CHECKING:
    from collections.abc import Mapping

    from corpus.case import Call, Case

__all__ = ["TEXT_CASES"]


def _encoder(name: str, head: str, call: Call, /, **settings: Any) -> Case:
    return tiny(name, head, call, TEXT | settings, **SEQUENCE)


def _decoder(name: str, head: str, call: Call = calls.causal, /, **settings: Any) -> Case:
    return tiny(name, head, call, TEXT | settings, **SEQUENCE)


def _grouped(name: str, head: str, call: Call = calls.causal, /, **settings: Any) -> Case:
    return tiny(name, head, call, GROUPED | settings, **SEQUENCE)


_ENCODERS = (
    _encoder("albert", "AlbertForMaskedLM", calls.filled_masks, embedding_size=16),
    _encoder("bert", "BertForMaskedLM", calls.filled_masks),
    _encoder("bert_classifies", "BertForSequenceClassification", calls.classified_sequences),
    _encoder(
        "big_bird",
        "BigBirdForTokenClassification",
        calls.tagged_tokens,
        attention_type="original_full",
    ),
    _encoder("camembert", "CamembertForTokenClassification", calls.tagged_tokens),
    _encoder(
        "canine",
        "CanineForSequenceClassification",
        calls.classified_sequences,
        num_hash_buckets=64,
        local_transformer_stride=8,
        downsampling_rate=4,
    ),
    _encoder("convbert", "ConvBertForTokenClassification", calls.tagged_tokens, embedding_size=32),
    _encoder(
        "deberta",
        "DebertaForMaskedLM",
        calls.filled_masks,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),
    _encoder(
        "deberta_v2",
        "DebertaV2ForSequenceClassification",
        calls.classified_sequences,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        share_att_key=True,
    ),
    _encoder("distilbert", "DistilBertForMaskedLM", calls.filled_masks, hidden_dim=48),
    _encoder("electra", "ElectraForMaskedLM", calls.filled_masks, embedding_size=16),
    _encoder("ernie", "ErnieForQuestionAnswering", calls.spans, num_labels=2),
    _encoder(
        "esm",
        "EsmForMaskedLM",
        calls.filled_masks,
        mask_token_id=4,
        position_embedding_type="rotary",
    ),
    _encoder("eurobert", "EuroBertForMaskedLM", calls.filled_masks),
    _encoder(
        "flaubert",
        "FlaubertForQuestionAnsweringSimple",
        calls.spans,
        emb_dim=32,
        n_layers=2,
        n_heads=4,
        num_labels=2,
    ),
    _encoder("fnet", "FNetForSequenceClassification", calls.classified_sequences),
    tiny(
        "funnel",
        "FunnelForSequenceClassification",
        calls.classified_sequences,
        WORDS | {"block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
        scratch=frozenset({"pooling_mult"}),  # a notepad of the forward's own
        **SEQUENCE,
    ),
    _encoder(
        "longformer",
        "LongformerForTokenClassification",
        calls.tagged_tokens,
        attention_window=[4, 4],
    ),
    _encoder("megatron_bert", "MegatronBertForSequenceClassification", calls.classified_sequences),
    _encoder(
        "mobilebert",
        "MobileBertForMaskedLM",
        calls.filled_masks,
        embedding_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=2,
    ),
    _encoder(
        "modernbert",
        "ModernBertForMaskedLM",
        calls.filled_masks,
        global_attn_every_n_layers=2,
        local_attention=8,
    ),
    _encoder("mpnet", "MPNetForSequenceClassification", calls.classified_sequences),
    _encoder("mra", "MraForMaskedLM", calls.filled_masks),
    _encoder(
        "nystromformer",
        "NystromformerForMaskedLM",
        calls.filled_masks,
        num_landmarks=4,
        segment_means_seq_len=4,
        conv_kernel_size=3,
    ),
    _encoder(
        "rembert",
        "RemBertForTokenClassification",
        calls.tagged_tokens,
        input_embedding_size=16,
        output_embedding_size=16,
    ),
    _encoder("roberta", "RobertaForSequenceClassification", calls.classified_sequences),
    _encoder(
        "roberta_eager",
        "RobertaForTokenClassification",
        calls.tagged_tokens,
        attn_implementation="eager",
    ),
    _encoder("roformer", "RoFormerForTokenClassification", calls.tagged_tokens, embedding_size=32),
    _encoder("splinter", "SplinterForQuestionAnswering", calls.spans, question_token_id=4),
    _encoder(
        "squeezebert",
        "SqueezeBertForSequenceClassification",
        calls.classified_sequences,
        embedding_size=32,
    ),
    _encoder(
        "xlm",
        "XLMForSequenceClassification",
        calls.classified_sequences,
        emb_dim=32,
        n_layers=2,
        n_heads=4,
    ),
    _encoder("xlm_roberta", "XLMRobertaForQuestionAnswering", calls.spans, num_labels=2),
    tiny(
        "xlnet",
        "XLNetForSequenceClassification",
        calls.classified_sequences,
        WORDS | {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        **SEQUENCE,
    ),
)

_DECODERS = (
    _decoder("biogpt", "BioGptForCausalLM"),
    _decoder("bloom", "BloomForCausalLM"),
    _decoder(
        "codegen", "CodeGenForCausalLM", n_ctx=64, rotary_dim=4, n_inner=48, num_attention_heads=4
    ),
    _grouped("cohere", "CohereForCausalLM"),
    _decoder("ctrl", "CTRLLMHeadModel", dff=48),
    _decoder("falcon", "FalconForCausalLM", multi_query=True),
    _decoder("falcon_alibi", "FalconForCausalLM", alibi=True, multi_query=False),
    _grouped("gemma", "GemmaForCausalLM", head_dim=8),
    _grouped("gemma2", "Gemma2ForCausalLM", head_dim=8, sliding_window=6),
    _grouped(
        "gemma3",
        "Gemma3ForCausalLM",
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    _grouped("glm", "GlmForCausalLM", head_dim=8),
    _decoder("gpt2", "GPT2LMHeadModel", calls.itself),
    _decoder("gpt2_padded", "GPT2ForSequenceClassification", calls.classified_sequences),
    _decoder("gpt_bigcode", "GPTBigCodeForCausalLM", n_inner=48),
    _decoder(
        "gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=6
    ),
    _decoder("gpt_neox", "GPTNeoXForCausalLM"),
    _decoder("gptj", "GPTJForCausalLM", calls.itself, rotary_dim=4),
    _grouped("granite", "GraniteForCausalLM"),
    _grouped("llama", "LlamaForCausalLM"),
    _grouped("llama_full", "LlamaForCausalLM", calls.itself),
    _grouped(
        "llama_eager",
        "LlamaForSequenceClassification",
        calls.classified_sequences,
        attn_implementation="eager",
    ),
    _grouped("mistral", "MistralForCausalLM", sliding_window=6),
    _decoder("mpt", "MptForCausalLM", d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    _grouped("nemotron", "NemotronForCausalLM"),
    _grouped("olmo", "OlmoForCausalLM", calls.itself),
    _grouped("olmo2", "Olmo2ForCausalLM"),
    _decoder("openai_gpt", "OpenAIGPTLMHeadModel", calls.itself),
    _decoder("opt", "OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=16),
    _decoder("persimmon", "PersimmonForCausalLM"),
    _grouped("phi", "PhiForCausalLM"),
    _grouped("phi3", "Phi3ForCausalLM", original_max_position_embeddings=64),
    _grouped("qwen2", "Qwen2ForCausalLM"),
    _grouped("qwen2_no_cache", "Qwen2ForTokenClassification", calls.tagged_tokens, use_cache=False),
    _grouped("qwen3", "Qwen3ForCausalLM", head_dim=8),
    _grouped("smollm3", "SmolLM3ForCausalLM"),
    _grouped("stablelm", "StableLmForCausalLM"),
    _grouped("starcoder2", "Starcoder2ForCausalLM"),
    _decoder("xglm", "XGLMForCausalLM", ffn_dim=48),
)

_T5 = WORDS | {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def _translator(name: str, head: str, settings: Mapping[str, Any], /, **more: Any) -> Case:
    return tiny(name, head, calls.translation, {**settings, **more}, **SEQUENCE)


_TRANSLATORS = (
    _translator("bart", "BartForConditionalGeneration", TWO_SIDED),
    tiny(
        "bart_classifies",
        "BartForSequenceClassification",
        calls.ended_sequences,
        TWO_SIDED,
        **SEQUENCE,
    ),
    _translator("blenderbot", "BlenderbotForConditionalGeneration", TWO_SIDED),
    tiny(
        "fsmt",
        "FSMTForConditionalGeneration",
        calls.causal,
        TWO_SIDED
        | {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"]},
        **SEQUENCE,
    ),
    _translator(
        "led",
        "LEDForConditionalGeneration",
        TWO_SIDED,
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    _translator("longt5", "LongT5ForConditionalGeneration", _T5, local_radius=3),
    _translator(
        "m2m_100",
        "M2M100ForConditionalGeneration",
        TWO_SIDED,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    ),
    _translator("marian", "MarianMTModel", TWO_SIDED),
    _translator("mbart", "MBartForConditionalGeneration", TWO_SIDED),
    _translator("mt5", "MT5ForConditionalGeneration", _T5),
    _translator("pegasus", "PegasusForConditionalGeneration", TWO_SIDED),
    _translator("plbart", "PLBartForConditionalGeneration", TWO_SIDED),
    _translator("t5", "T5ForConditionalGeneration", _T5),
    _translator("umt5", "UMT5ForConditionalGeneration", _T5),
)

_LOOPED = "loops over those experts that some token chose"

_EXPERTS = (
    _grouped(
        "gpt_oss",
        "GptOssForCausalLM",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=6,
    ),
    _grouped(
        "mixtral",
        "MixtralForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
    ),
    tiny(
        "mixtral_eager",
        "MixtralForCausalLM",
        calls.causal,
        GROUPED
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
        **SEQUENCE,
        graph=False,
        why=_LOOPED,
    ),
    _grouped("olmoe", "OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2),
    _grouped(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    _grouped(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        head_dim=8,
    ),
    tiny(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        calls.translation,
        _T5
        | {
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 4,
            "expert_capacity": 8,
        },
        **SEQUENCE,
        graph=False,
        why=_LOOPED,
    ),
)

_STATE_SPACES = (
    _decoder("falcon_mamba", "FalconMambaForCausalLM", state_size=4, time_step_rank=4),
    _grouped(
        "jamba",
        "JambaForCausalLM",
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    _decoder("mamba", "MambaForCausalLM", state_size=4, time_step_rank=4),
    _decoder(
        "mamba2",
        "Mamba2ForCausalLM",
        state_size=4,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        chunk_size=4,
    ),
    _grouped(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        attention_window_size=6,
        block_types=["recurrent", "attention"],
    ),
    tiny(
        "rwkv",
        "RwkvForCausalLM",
        calls.itself,
        TEXT | {"attention_hidden_size": 32, "context_length": 64},
        why="its first forward in eval rescales the weights, and a flag says that it did",
        graph=False,
        **SEQUENCE,
    ),
    tiny(
        "xlstm",
        "xLSTMForCausalLM",
        calls.itself,
        TEXT
        | {
            "hidden_size": 64,
            "num_heads": 2,
            "chunk_size": 4,
            "qk_dim_factor": 1.0,
            "ffn_round_up_to_multiple_of": 8,
        },
        **SEQUENCE,
        training=False,
        why="its kernels in plain torch write over what backward needs",
    ),
)

TEXT_CASES: tuple[Case, ...] = (
    *_ENCODERS,
    *_DECODERS,
    *_TRANSLATORS,
    *_EXPERTS,
    *_STATE_SPACES,
)
