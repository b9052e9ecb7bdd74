"""Hugging Face's ViT and ViTMAE: names of their tensors, and whether a config.json describes a network of ours."""

from mae.models.layers import LAYER_NORM_EPS
from mae.weights.metadata import Settings

# Our names, and those of transformers 4, which the hub's own files have, and of 5, which still reads those.
BLOCK_LAYERS = {
    "attn.q": ("attention.attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),  # after attention.output.dense: the first that matches counts
}
OTHER_LAYERS = {  # of ViTMAE and of classifiers these begin with `vit.`, but for the classifier
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "head": "classifier",
}
MODEL_TYPES = ("vit", "vit_mae", "vit_msn")
SETTINGS: dict[str, tuple[object, ...]] = {  # of the function, with the values that ours has
    "hidden_act": ("gelu", "gelu_python"),  # GELUs by the error function
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
}
HARMLESS = {  # sizes, which the tensors tell; training; text generation; bookkeeping
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size"),
    *("num_channels", "layer_norm_eps", "qkv_bias", "encoder_stride", "pooler_act", "pooler_output_size"),
    *("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads", "decoder_intermediate_size"),
    *("mask_ratio", "norm_pix_loss", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "use_cache"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "_commit_hash", "auto_map"),
    *("gradient_checkpointing", "use_bfloat16", "torchscript", "tf_legacy_loss", "use_return_dict"),
    *("tie_word_embeddings", "tie_encoder_decoder", "cross_attention_hidden_size", "tokenizer_class", "prefix"),
    *("bos_token_id", "pad_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "max_length"),
    *("min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature"),
    *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores"),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
}


def model_name(config: Settings) -> object:
    """The class of the model that a config.json describes, or its `model_type`."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names else config["model_type"]


def config_difference(config: Settings) -> str:
    """How the network of a config.json with `model_type` differs from ours, as a part of a sentence, or ""."""
    kind = config["model_type"]
    if kind not in MODEL_TYPES:
        return (
            f"its config.json says that it is Hugging Face's {model_name(config)} (model_type={kind}): of Hugging "
            "Face's models only ViT, ViTMAE and ViTMSN are computed here"
        )
    if reason := setting_difference(config):
        return reason
    for key, value in config.items():
        if key not in SETTINGS and key not in HARMLESS and value:
            return (
                f"its config.json says {key}={value}, which is not known here. Remove that key from it if it does "
                "not change what the network computes"
            )
    return ""


def setting_difference(config: Settings) -> str:
    """Which setting of the function has another value than ours, as a part of a sentence, or ""."""
    eps = config.get("layer_norm_eps")
    if eps is not None and not (isinstance(eps, int | float) and eps <= LAYER_NORM_EPS):
        return f"its config says layer_norm_eps={eps}, ours is {LAYER_NORM_EPS:g}"
    for key, allowed in SETTINGS.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            return f"its config says {key}={value}, ours is {allowed[0]}"
    return ""
