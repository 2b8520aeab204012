"""Table of the checks of transformers' test suites: the tests that cover them here, or the reason why none does.

`python -m tests.common_checks` prints the table in Markdown. The names are those of the mixins in transformers' source
distribution, which tests/test_published_checks.py runs and compares with this table, of its
`peft_integration/test_peft_integration.py`, and of checks of earlier releases that users still look for.
"""

import ast
import functools
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
OWN_FILES = ("test_common", "test_attention", "test_gradients", "test_save_load_export")
NO_GPU = "needs accelerators, which the suite does not use; "
NO_FLASH = (
    "flash attention does not support the masks of masked attention (a query attends to the inside of its mask), so "
    "it raises an error: test_attention_implementations_without_masks_raise_errors"
)
NO_TOKENS = "the input is an image; class names are passed as text or embeddings, and the text encoder is frozen"
NO_DEEPSPEED = "there are no token embeddings to resize, and DeepSpeed is not supported"
NO_MEDIA = "there is no such modality"
NO_ROTARY = "no rotary position embeddings"
NO_CHAT = "the text input is class names: there is no chat template"
NO_PLACEHOLDERS = "texts contain no image tokens"
NOT_THIS_TASK = "the model does not do this task"
TEXT_FEATURES = "tests/test_modeling.py"
IMAGE_FEATURES = "there is no `get_image_features`; GKCModel and CLIPResNetVisionModel return features as their output"


class Entry(NamedTuple):
    """Names of the tests that cover a check, or the reason why none does; a partly covered check has both."""

    tests: tuple[str, ...] = ()
    reason: str = ""


def covered_by(*tests: str, but: str = "") -> Entry:
    return Entry(tests, but)


def not_covered(reason: str) -> Entry:
    return Entry((), reason)


MODELING = {
    "test_num_layers_is_small": covered_by("test_model_is_small"),
    "test_model_is_small": covered_by("test_model_is_small"),
    "test_save_load": covered_by("test_save_load"),
    "test_from_pretrained_no_checkpoint": covered_by("test_from_pretrained_no_checkpoint"),
    "test_keep_in_fp32_modules_exist": not_covered(
        "no module is kept in fp32: single operations that need fp32 are computed in it"
    ),
    "test_keep_in_fp32_modules": covered_by("test_half_precision_is_close_to_single", but="no module is kept in fp32"),
    "test_save_load_keys_to_ignore_on_save": covered_by("test_all_weights_are_saved_under_their_names"),
    "test_load_contiguous_weights": covered_by("test_load_contiguous_weights"),
    "test_gradient_checkpointing_backward_compatibility": covered_by("test_gradient_checkpointing_by_configuration"),
    "test_gradient_checkpointing_enable_disable": covered_by("test_gradient_checkpointing_enable_disable"),
    "test_peft_gradient_checkpointing_enable_disable": covered_by(
        "test_gradient_checkpointing_enable_disable", "test_lora_trains_under_gradient_checkpointing"
    ),
    "test_enable_input_require_grads": covered_by("test_enable_input_require_grads"),
    "test_enable_input_require_grads_with_gradient_checkpointing": covered_by(
        "test_lora_trains_under_gradient_checkpointing"
    ),
    "test_can_init_all_missing_weights": covered_by("test_can_init_all_missing_weights"),
    "test_init_weights_can_init_buffers": covered_by("test_init_weights_can_init_buffers"),
    "test_all_tensors_are_parameter_or_buffer": covered_by("test_all_tensors_are_parameter_or_buffer"),
    "test_torch_save_load": covered_by("test_torch_save_load"),
    "test_determinism": covered_by("test_determinism"),
    "test_batching_equivalence": covered_by("tests/test_batching.py"),
    "test_model_forward_default_config_values": covered_by("test_model_forward_default_config_values"),
    "test_training": covered_by("test_training"),
    "test_training_gradient_checkpointing": covered_by(
        "test_training_gradient_checkpointing", "test_checkpointing_updates_batchnorm_statistics_once"
    ),
    "test_training_gradient_checkpointing_use_reentrant_false": covered_by("test_training_gradient_checkpointing"),
    "test_training_gradient_checkpointing_use_reentrant_true": covered_by("test_training_gradient_checkpointing"),
    "test_attention_outputs": covered_by(
        "test_attention_outputs",
        "test_sdpa_returns_no_attention_weights",
        "test_cross_attention_is_restricted_to_the_previous_mask",
    ),
    "test_hidden_states_output": covered_by(
        "test_hidden_states_output",
        "test_hidden_states_do_not_change_outputs",
        "test_hidden_states_equal_those_of_mask2former",
        "test_segmenter_returns_the_hidden_states_of_the_image_path",
        "test_hidden_states_of_several_image_sizes_raise_errors",
        "test_hidden_states_exclude_the_padding",
        "test_hidden_states_include_the_padding_in_training",
    ),
    "test_retain_grad_hidden_states_attentions": covered_by("test_retain_grad_hidden_states_attentions"),
    "test_feed_forward_chunking": not_covered(
        "feed-forward layers are not chunked: feature maps take most of the memory"
    ),
    "test_resize_position_vector_embeddings": not_covered(
        "positions are computed for any size, or resized in CLIP's tower: tests/test_clip_resnet.py"
    ),
    "test_resize_tokens_embeddings": covered_by("test_resize_token_embeddings_is_an_error", but=NO_TOKENS),
    "test_resize_tokens_embeddings_with_deepspeed": not_covered(NO_DEEPSPEED),
    "test_resize_tokens_embeddings_with_deepspeed_multi_gpu": not_covered(NO_DEEPSPEED),
    "test_resize_embeddings_untied": covered_by("test_resize_token_embeddings_is_an_error", but=NO_TOKENS),
    "test_resize_embeddings_untied_with_deepspeed": not_covered(NO_DEEPSPEED),
    "test_resize_embeddings_untied_with_deepspeed_multi_gpu": not_covered(NO_DEEPSPEED),
    "test_model_get_set_embeddings": covered_by("test_get_and_set_input_embeddings"),
    "test_model_main_input_name": covered_by("test_forward_signature"),
    "test_model_base_model_prefix": covered_by("test_base_model_prefix"),
    "test_correct_missing_keys": covered_by("test_correct_missing_keys"),
    "test_can_use_safetensors": covered_by("test_can_use_safetensors"),
    "test_load_save_without_tied_weights": covered_by(
        "test_all_weights_are_saved_under_their_names", but="no weights are tied"
    ),
    "test_tied_weights_keys": covered_by("test_all_weights_are_saved_under_their_names", but="no weights are tied"),
    "test_model_weights_reload_no_missing_tied_weights": covered_by(
        "test_all_missing_weights_are_reported_and_initialized"
    ),
    "test_model_outputs_equivalence": covered_by(
        "test_model_outputs_equivalence", "test_return_dict_of_the_configuration"
    ),
    "test_inputs_embeds": not_covered(NO_TOKENS + "; `class_embeds` is the counterpart: tests/test_modeling.py"),
    "test_inputs_embeds_matches_input_ids": not_covered(
        NO_TOKENS + "; `class_embeds` is the counterpart: tests/test_modeling.py"
    ),
    "test_disk_offload_bin": not_covered(
        "pickled weights are read only if requested by name; safetensors are tested below"
    ),
    "test_disk_offload_safetensors": covered_by("test_disk_offload_does_not_change_outputs"),
    "test_cpu_offload": covered_by("test_cpu_offload_does_not_change_outputs"),
    "test_model_parallelism": covered_by(
        "test_device_map_splits_no_layer", but=NO_GPU + "the rules of which layers stay together are tested"
    ),
    "test_problem_types": not_covered("no classification or regression head"),
    "test_load_with_mismatched_shapes": covered_by("test_weights_of_mismatched_shape"),
    "test_can_load_ignoring_mismatched_shapes": covered_by("test_weights_of_mismatched_shape"),
    "test_flash_attn_kernels_inference_equivalence": not_covered(NO_FLASH),
    "test_flash_attn_kernels_mps_inference_equivalence": not_covered(NO_FLASH),
    "test_flash_attn_2_inference_equivalence": not_covered(NO_FLASH),
    "test_flash_attn_2_inference_equivalence_right_padding": not_covered(NO_FLASH),
    "test_flash_attn_3_inference_equivalence": not_covered(NO_FLASH),
    "test_flash_attn_3_inference_equivalence_right_padding": not_covered(NO_FLASH),
    "test_flash_attn_2_can_dispatch_composite_models": covered_by(
        "test_attention_implementations_without_masks_raise_errors", but=NO_FLASH
    ),
    "test_flash_attn_3_can_dispatch_composite_models": not_covered(NO_FLASH),
    "test_flash_attn_2_fp32_ln": not_covered(NO_FLASH),
    "test_flash_attn_2_can_compile_with_attention_mask_None_without_graph_break": not_covered(NO_FLASH),
    "test_flash_attn_2_from_config": not_covered(NO_FLASH),
    "test_flash_attn_3_from_config": not_covered(NO_FLASH),
    "test_attn_implementation_composite_models": covered_by("test_attn_implementation_composite_models"),
    "test_sdpa_can_dispatch_non_composite_models": covered_by("test_attn_implementation_at_loading"),
    "test_sdpa_can_dispatch_composite_models": covered_by(
        "test_attn_implementation_at_loading", "test_attn_implementation_composite_models"
    ),
    "test_eager_matches_sdpa_inference": covered_by(
        "test_eager_matches_sdpa_inference",
        "test_eager_matches_sdpa_inference_in_half_precision",
        "test_eager_matches_sdpa_gradients",
        "test_query_with_an_empty_mask_attends_to_all_positions",
    ),
    "test_eager_matches_batched_and_grouped_inference": not_covered("there are no experts"),
    "test_sdpa_can_dispatch_on_flash": not_covered(NO_FLASH),
    "test_sdpa_can_compile_dynamic": covered_by(
        "test_image_path_compiles_without_graph_break",
        but=NO_GPU + "each image size is compiled separately, because it determines the shapes of all maps",
    ),
    "test_sliding_window_mask": not_covered("no sliding window: attention is restricted by masks"),
    "test_torch_compile_for_training": covered_by("test_image_path_compiles_without_graph_break"),
    "test_flex_attention_with_grads": covered_by(
        "test_attention_implementations_without_masks_raise_errors", but="masks are predicted at every layer"
    ),
    "test_generation_tester_mixin_inheritance": covered_by("test_models_cannot_generate"),
    "test_can_be_initialized_on_meta": covered_by("test_can_be_initialized_on_meta"),
    "test_can_load_with_device_context_manager": covered_by(
        "test_device_context_is_respected", but=NO_GPU + "tested on the CPU"
    ),
    "test_can_load_with_global_device_set": covered_by(
        "test_device_context_is_respected", but=NO_GPU + "tested on the CPU"
    ),
    "test_cannot_load_with_meta_device_context_manager": covered_by(
        "test_cannot_load_with_meta_device_context_manager"
    ),
    "test_config_attn_implementation_setter": covered_by("test_config_attn_implementation_setter"),
    "test_internal_model_config_and_subconfig_are_same": covered_by(
        "test_internal_model_config_and_subconfig_are_same"
    ),
    "test_can_set_attention_dynamically": covered_by(
        "test_can_set_attention_dynamically", "test_registered_attention_is_used"
    ),
    "test_can_set_attention_dynamically_composite_model": covered_by("test_can_set_attention_dynamically"),
    "test_bc_torch_dtype": covered_by("test_dtype_at_loading"),
    "test_tp_plan_matches_params": not_covered(
        "no plan for tensor parallelism: the largest model has 60 M parameters"
    ),
    "test_reverse_loading_mapping": covered_by(
        "test_save_load",
        but="weights of this library are not renamed; transformers' backbones rename theirs in both directions",
    ),
    "test_can_load_from_already_mapped_keys": covered_by(
        "test_save_load", but="weights of this library are not renamed"
    ),
    "test_get_text_features_output": covered_by(TEXT_FEATURES),
    "test_get_text_features_hidden_states": covered_by(TEXT_FEATURES),
    "test_get_text_features_attentions": covered_by(TEXT_FEATURES),
    "test_get_image_features_output": not_covered(IMAGE_FEATURES),
    "test_get_image_features_hidden_states": not_covered(IMAGE_FEATURES),
    "test_get_image_features_attentions": not_covered(IMAGE_FEATURES),
    **{
        f"test_get_{kind}_features_{what}": not_covered(NO_MEDIA)
        for kind in ("audio", "video")
        for what in ("output", "hidden_states", "attentions")
    },
    "test_capture_outputs_decorator": not_covered(
        "states are passed on instead of captured by hooks, so that the model can be pickled"
    ),
    "test_base_model_prefix_loads_base_weights": covered_by("test_correct_missing_keys"),
    "test_can_capture_specific_layers_hidden_states": not_covered(
        "states of all layers are returned; there is no argument to select some"
    ),
    "test_format_of_can_record_outputs": not_covered("states are passed on instead of captured by hooks"),
    "test_causal_lm_loss_honors_shift_labels": not_covered("there is no language model"),
    "test_encoder_decoder_loss_no_double_shift": not_covered("there is no language model"),
    "test_flash_attn_4_can_dispatch_composite_models": not_covered(NO_FLASH),
    "test_flash_attn_4_from_config": not_covered(NO_FLASH),
    "test_flash_attn_4_inference_equivalence": not_covered(NO_FLASH),
    "test_flash_attn_4_inference_equivalence_right_padding": not_covered(NO_FLASH),
    "test_get_image_features_pooler_output": not_covered(IMAGE_FEATURES),
    "test_get_video_features_pooler_output": not_covered(NO_MEDIA),
    "test_kernels_can_load_without_crashing": not_covered(NO_GPU + "kernels of the Hub are not used"),
    "test_model_rope_scaling_frequencies": not_covered(NO_ROTARY),
    "test_model_rope_scaling_from_config": not_covered(NO_ROTARY),
    "test_model_rope_with_partial_rotation": not_covered(NO_ROTARY),
    "test_vision_axial_rope": not_covered(NO_ROTARY),
    "test_moe_models_record_router_logits": not_covered("there are no experts"),
    "test_output_router_logits_from_config": not_covered("there are no experts"),
    "test_resize_embeddings_untied_no_reinit_on_post_init": covered_by(
        "test_resize_token_embeddings_is_an_error", but=NO_TOKENS
    ),
    "test_tied_head_has_a_tp_plan_entry": not_covered(
        "no weights are tied, and there is no plan for tensor parallelism"
    ),
}

RELEASE_4 = {
    "test_multi_gpu_data_parallel_forward": not_covered(
        NO_GPU + "training uses accelerate: tests/test_distributed.py"
    ),
    "test_torch_export": covered_by("test_torch_export"),
    "test_forward_signature": covered_by("test_forward_signature"),
    "test_initialization": covered_by(
        "test_can_init_all_missing_weights", but="published starts: tests/test_modeling.py"
    ),
    "test_headmasking": not_covered("removed from transformers 5; head masks are not supported"),
    "test_head_pruning": not_covered("removed from transformers 5; heads are not pruned"),
    "test_torchscript_simple": not_covered("removed from transformers 5 in favor of export"),
    "test_torch_fx": not_covered("removed from transformers 5 in favor of compile and export"),
    "test_save_load_low_cpu_mem_usage": covered_by("test_sharded_and_low_memory_loading_give_equal_weights"),
    "test_save_load_fast_init_to_base": covered_by("test_correct_missing_keys"),
    "test_save_load_fast_init_from_base": covered_by("test_correct_missing_keys"),
    "test_matched_shapes_have_loaded_weights_when_some_mismatched_shapes_exist": covered_by(
        "test_weights_of_mismatched_shape"
    ),
    "test_mismatched_shapes_have_properly_initialized_weights": covered_by("test_weights_of_mismatched_shape"),
    "test_load_with_torch_dtype_auto": covered_by("test_dtype_at_loading"),
    "test_checkpoint_sharding_local": covered_by("test_sharded_and_low_memory_loading_give_equal_weights"),
    "test_default_dtype": covered_by("test_default_dtype_is_respected"),
}


# Checks that do not run as published, with reasons; tests of this project cover them where they apply.
NOT_RUN_OF_MODELS = {
    "test_attention_outputs": "expects self-attention of tokens; here queries attend to maps",
    "test_bc_torch_dtype": "passes, but takes 30 s of processor time",
    "test_eager_matches_sdpa_inference": "expects one field `hidden_states`; here there are three",
    "test_hidden_states_output": "expects one field `hidden_states`; here there are three",
    "test_retain_grad_hidden_states_attentions": "expects one field `hidden_states`; here there are three",
    "test_model_get_set_embeddings": "expects token embeddings; here the input embedding is a convolution",
    "test_model_outputs_equivalence": "calls twice with labels, but mask losses sample random points",
}
NOT_RUN_OF_BACKBONES = {"test_config": "the default is all four stages instead of the last one"}
NOT_RUN_OF_IMAGE_PROCESSORS = {
    "test_backends_equivalence": "downloads an image",
    "test_new_models_require_torchvision_backend": "expects another file",
}
NOT_RUN_OF_PROCESSORS = {
    "test_replacement_offsets": NO_PLACEHOLDERS,
    "test_call_arguments_not_in_attributes": "`prompt_templates` is both",
    "test_call_arguments_not_in_processor_kwargs": "`return_tensors` is both",
}

IMAGE_PROCESSORS = {
    "test_can_compile_torchvision_backend": not_covered(
        "images are processed by Pillow on the CPU: nothing is compiled"
    ),
    "test_image_processor_preprocess_arguments": covered_by(
        "test_unknown_settings", but="it expects one of two older forms of argument checks, which are not used"
    ),
    "test_override_instance_attributes_does_not_affect_other_instances": not_covered(
        "sizes and means are stored as tuples, as in transformers' own processors, for which it is skipped too"
    ),
    "test_pil_can_run_without_torchvision": covered_by(
        "test_auto_classes_are_registered_for_any_import_order",
        but="published as a slow test; the suite runs without slow tests",
    ),
    "test_backends_equivalence": not_covered(
        "downloads an image; test_backends_equivalence_batched uses generated images"
    ),
    "test_new_models_require_torchvision_backend": covered_by(
        "test_auto_classes_are_registered_for_any_import_order",
        but="images are processed by Pillow, not torchvision",
    ),
}

POST_PROCESSING = {}

ANNOTATIONS = {
    "test_processor_can_use_legacy_annotation_format": not_covered(
        "annotations are passed as segmentation maps; COCO's files are read by `train.data`"
    ),
}

PROCESSORS = {
    **{
        name: not_covered(NO_CHAT)
        for name in (
            "test_chat_template_save_loading",
            "test_chat_template_saving_rejects_path_traversal",
            "test_apply_chat_template_image",
            "test_chat_template_jinja_kwargs",
            "test_apply_chat_template_assistant_mask",
            "test_apply_chat_template_tool_calls_no_content",
        )
    },
    **{
        name: not_covered(NO_MEDIA)
        for name in (
            "test_apply_chat_template_audio",
            "test_chat_template_audio_sampling_rate",
            "test_apply_chat_template_decoded_video",
            "test_apply_chat_template_video",
            "test_apply_chat_template_video_frame_sampling",
            "test_chat_template_audio_from_video",
            "test_get_num_multimodal_tokens_matches_processor_call_video",
            "test_get_num_multimodal_tokens_matches_processor_call_audio",
        )
    },
    "test_get_num_multimodal_tokens_matches_processor_call": not_covered(NO_PLACEHOLDERS),
    "test_replacement_offsets": not_covered(NO_PLACEHOLDERS),
    "test_if_input_has_mismatching_tokens_and_mm_data": not_covered(NO_PLACEHOLDERS),
    "test_call_arguments_not_in_attributes": not_covered(
        "`prompt_templates` of a call overrides the processor's, as the signature shows"
    ),
    "test_call_arguments_not_in_processor_kwargs": not_covered(
        "`return_tensors` is the third positional argument, or one of the keyword arguments of a modality"
    ),
}

OTHER_TASKS = [
    "any_to_any",
    "audio_classification",
    "automatic_speech_recognition",
    "depth_estimation",
    "document_question_answering",
    "feature_extraction",
    "fill_mask",
    "image_classification",
    "image_feature_extraction",
    "image_text_to_text",
    "mask_generation",
    "object_detection",
    "table_question_answering",
    "text_classification",
    "text_generation",
    "text_to_audio",
    "token_classification",
    "video_classification",
    "zero_shot",
    "zero_shot_audio_classification",
    "zero_shot_image_classification",
    "zero_shot_object_detection",
]

PIPELINES = {
    **{f"test_pipeline_{task}{dtype}": not_covered(NOT_THIS_TASK) for task in OTHER_TASKS for dtype in ("", "_fp16")},
    "test_pipeline_image_segmentation": covered_by(
        "tests/test_pipeline.py", but="as published it downloads models and checks nothing of this library"
    ),
    "test_pipeline_image_segmentation_fp16": covered_by(
        "test_half_precision", but="as published it downloads models and checks nothing of this library"
    ),
}


BACKBONE = {
    "test_config": covered_by(
        "test_stages_are_selected_by_configuration", but="the default is all four stages instead of the last one"
    ),
    "test_forward_signature": covered_by("test_forward_signature"),
    "test_config_save_pretrained": covered_by("test_selected_stages_are_returned"),
    "test_channels": covered_by("test_selected_stages_are_returned"),
    "test_create_from_modified_config": covered_by("test_selected_stages_are_returned"),
    "test_backbone_common_attributes": covered_by("test_backbone_common_attributes"),
    "test_backbone_outputs": covered_by("test_hidden_states_output", "test_tower_and_backbone_share_a_checkpoint"),
    "test_backbone_stage_selection": covered_by("test_selected_stages_are_returned"),
}

CONFIGURATION = {
    "create_and_test_config_common_properties": not_covered(
        "hidden_size and num_attention_heads exist; a single number of layers would be ambiguous"
    ),
    "create_and_test_config_to_json_string": covered_by("test_configuration_round_trips"),
    "create_and_test_config_to_json_file": covered_by("test_configuration_round_trips"),
    "create_and_test_config_from_and_save_pretrained": covered_by("test_configuration_round_trips"),
    "create_and_test_config_from_and_save_pretrained_subfolder": covered_by("test_configuration_round_trips"),
    "create_and_test_config_from_and_save_pretrained_composite": covered_by(
        "test_text_configuration_is_read_from_a_full_checkpoint"
    ),
    "create_and_test_config_with_num_labels": covered_by("test_id2label_of_the_configuration"),
    "check_config_can_be_init_without_params": covered_by("test_default_configuration_is_valid"),
    "check_config_arguments_init": covered_by("test_keyword_arguments_override_the_stored_configuration"),
    "create_and_test_config_from_pretrained_custom_kwargs": covered_by(
        "test_keyword_arguments_override_the_stored_configuration"
    ),
}

TRAINING_AND_PEFT = {
    "test_training_overfit": covered_by("test_training_overfit", "test_training_mode_does_not_change_frozen_parts"),
    "test_peft_from_pretrained": covered_by("test_lora_is_saved_loaded_and_merged"),
    "test_peft_state_dict": covered_by("test_only_mask_decoder_adapters_are_trained"),
    "test_peft_save_pretrained": covered_by("test_lora_is_saved_loaded_and_merged"),
    "test_peft_enable_disable_adapters": covered_by("test_transformers_add_adapter"),
    "test_peft_add_adapter": covered_by("test_transformers_add_adapter"),
    "test_peft_add_adapter_modules_to_save": covered_by("test_lora_with_fully_trained_head"),
    "test_peft_add_adapter_training_gradient_checkpointing": covered_by(
        "test_lora_trains_under_gradient_checkpointing"
    ),
    "test_peft_add_multi_adapter": not_covered("several adapters at once concern PEFT only, not the model"),
    "test_peft_load_adapter_training_inference_mode": covered_by("test_only_mask_decoder_adapters_are_trained"),
    "test_peft_from_pretrained_kwargs": not_covered("quantized weights need bitsandbytes, which is not supported"),
}

BEYOND = {
    "test_push_to_hub_dynamic_config": covered_by(
        "test_subclass_with_own_model_type", but="no network: tests/test_remote_code.py"
    ),
    "copies and pickles are complete": covered_by(
        "test_copies_are_complete_and_independent",
        but="transformers' Swin registers hooks, so a model with it can be copied but not pickled",
    ),
    "several threads share a model": covered_by("test_model_can_be_shared_by_threads"),
    "autocast, float16 and bfloat16 are close to float32": covered_by("test_half_precision_is_close_to_single"),
    "the model is trainable after inference mode": covered_by("test_model_is_trainable_after_inference_mode"),
    "all stages in training": covered_by("test_training_mode_returns_all_stages"),
    "variants and subfolders": covered_by("test_variants_and_subfolders"),
    "device_map='auto' with little memory": covered_by("test_automatic_device_map_offloads_to_disk"),
    "parts on several devices": covered_by("test_parts_run_on_different_devices"),
    "graphs of the default compiler": covered_by(
        "test_image_path_compiles_with_inductor", but="takes minutes: only on request"
    ),
    "a pattern excludes the text encoder from adapters": covered_by(
        "test_text_tower_shares_projection_names_with_the_mask_decoder"
    ),
    "this list is complete": covered_by(
        "test_every_check_has_a_test_or_a_reason",
        "test_every_common_test_is_listed",
        "test_documented_numbers_of_checks_are_right",
    ),
}

SUITES = {
    "Models": MODELING,
    "Models, earlier releases": RELEASE_4,
    "Backbones": BACKBONE,
    "Configurations": CONFIGURATION,
    "Training and PEFT": TRAINING_AND_PEFT,
    "Image processors": IMAGE_PROCESSORS,
    "Post-processing": POST_PROCESSING,
    "Annotations": ANNOTATIONS,
    "Processors": PROCESSORS,
    "Pipelines": PIPELINES,
    "Beyond these suites": BEYOND,
}


# Checks that run and pass as published, on models and processors of this library; the others of a mixin skip
# themselves or do not run. tests/test_published_checks.py checks this list.
RUN_AS_PUBLISHED = {
    "Models": [
        "test_all_tensors_are_parameter_or_buffer",
        "test_attn_implementation_composite_models",
        "test_base_model_prefix_loads_base_weights",
        "test_batching_equivalence",
        "test_can_be_initialized_on_meta",
        "test_can_init_all_missing_weights",
        "test_can_load_from_already_mapped_keys",
        "test_can_load_ignoring_mismatched_shapes",
        "test_can_set_attention_dynamically",
        "test_can_set_attention_dynamically_composite_model",
        "test_can_use_safetensors",
        "test_cannot_load_with_meta_device_context_manager",
        "test_capture_outputs_decorator",
        "test_config_attn_implementation_setter",
        "test_correct_missing_keys",
        "test_determinism",
        "test_enable_input_require_grads",
        "test_feed_forward_chunking",
        "test_format_of_can_record_outputs",
        "test_from_pretrained_no_checkpoint",
        "test_generation_tester_mixin_inheritance",
        "test_get_audio_features_attentions",
        "test_get_audio_features_hidden_states",
        "test_get_audio_features_output",
        "test_get_image_features_attentions",
        "test_get_image_features_hidden_states",
        "test_get_image_features_output",
        "test_get_image_features_pooler_output",
        "test_get_text_features_attentions",
        "test_get_text_features_hidden_states",
        "test_get_text_features_output",
        "test_get_video_features_attentions",
        "test_get_video_features_hidden_states",
        "test_get_video_features_output",
        "test_get_video_features_pooler_output",
        "test_gradient_checkpointing_backward_compatibility",
        "test_gradient_checkpointing_enable_disable",
        "test_init_weights_can_init_buffers",
        "test_inputs_embeds_matches_input_ids",
        "test_internal_model_config_and_subconfig_are_same",
        "test_load_contiguous_weights",
        "test_load_save_without_tied_weights",
        "test_load_with_mismatched_shapes",
        "test_model_base_model_prefix",
        "test_model_forward_default_config_values",
        "test_model_is_small",
        "test_model_main_input_name",
        "test_model_weights_reload_no_missing_tied_weights",
        "test_num_layers_is_small",
        "test_peft_gradient_checkpointing_enable_disable",
        "test_problem_types",
        "test_save_load",
        "test_save_load_keys_to_ignore_on_save",
        "test_sdpa_can_dispatch_non_composite_models",
        "test_tied_weights_keys",
        "test_torch_save_load",
        "test_training",
        "test_training_gradient_checkpointing",
        "test_training_gradient_checkpointing_use_reentrant_false",
        "test_training_gradient_checkpointing_use_reentrant_true",
    ],
    "Backbones": [
        "test_backbone_common_attributes",
        "test_backbone_outputs",
        "test_backbone_stage_selection",
        "test_channels",
        "test_config_save_pretrained",
        "test_create_from_modified_config",
        "test_forward_signature",
    ],
    "Image processors": [
        "test_backends_equivalence_batched",
        "test_call_numpy",
        "test_call_numpy_4_channels",
        "test_call_pil",
        "test_call_pytorch",
        "test_cast_dtype_device",
        "test_convert_to_rgb_mixed_input_batch",
        "test_fast_image_processor_explicit_none_preserved",
        "test_image_processor_from_and_save_pretrained",
        "test_image_processor_from_dict_has_attributes",
        "test_image_processor_from_dict_with_kwargs_has_attributes",
        "test_image_processor_has_attributes",
        "test_image_processor_save_load_with_autoimageprocessor",
        "test_image_processor_to_json_file",
        "test_image_processor_to_json_string",
        "test_init_without_params",
        "test_post_process_test_mixin_inheritance",
        "test_save_load_backends",
        "test_save_load_backends_auto",
        "test_valid_kwargs_set",
    ],
    "Post-processing": [
        "test_post_process_semantic_segmentation",
        "test_post_process_semantic_segmentation_target_sizes",
    ],
    "Processors": [
        "test_args_overlap_kwargs",
        "test_call_arguments_default_none",
        "test_doubly_passed_kwargs",
        "test_flat_kwarg_applied_when_modality_dict_lacks_it",
        "test_if_input_has_mismatching_tokens_and_mm_data",
        "test_init_arguments_not_in_class_attributes",
        "test_init_arguments_not_in_processor_kwargs",
        "test_kwargs_overrides_default_subprocessor_kwargs",
        "test_model_input_names",
        "test_no_redundant_default_kwargs",
        "test_overlapping_text_image_kwargs_handling",
        "test_processor_from_and_save_pretrained",
        "test_processor_from_and_save_pretrained_as_nested_dict",
        "test_processor_from_pretrained_vs_from_components",
        "test_processor_text_has_no_visual",
        "test_processor_to_json_string",
        "test_processor_with_multiple_inputs",
        "test_save_load_pretrained_additional_features",
        "test_structured_kwargs_nested_from_dict",
        "test_subprocessor_defaults",
        "test_subprocessor_defaults_preserved_by_kwargs",
        "test_tokenizer_decode_defaults",
        "test_unstructured_kwargs",
        "test_unstructured_kwargs_batched",
        "test_valid_processor_kwargs_set",
    ],
}


class Published(NamedTuple):
    """Mixin of transformers' tests: its module, its class, and its checks that do not run as published."""

    module: str
    mixin: str
    not_run: Collection[str] | None  # None: none is run


PUBLISHED = {
    "Models": Published("test_modeling_common", "ModelTesterMixin", NOT_RUN_OF_MODELS),
    "Backbones": Published("test_backbone_common", "BackboneTesterMixin", NOT_RUN_OF_BACKBONES),
    "Configurations": Published("test_configuration_common", "ConfigTester", None),
    "Image processors": Published(
        "test_image_processing_common", "ImageProcessingTestMixin", NOT_RUN_OF_IMAGE_PROCESSORS
    ),
    "Post-processing": Published("test_image_processing_common", "PostProcessSemanticSegmentationTestMixin", ()),
    "Annotations": Published("test_image_processing_common", "AnnotationFormatTestMixin", None),
    "Processors": Published("test_processing_common", "ProcessorTesterMixin", NOT_RUN_OF_PROCESSORS),
    "Pipelines": Published("test_pipeline_mixin", "PipelineTesterMixin", None),
}


def entries() -> Iterator[tuple[str, Entry]]:
    """Yield every check of every suite."""
    for checks in SUITES.values():
        yield from checks.items()


@functools.cache
def defined_tests(files: Collection[str] | None = None) -> frozenset[str]:
    """Return the names of the test functions in `files`; by default of all test files, and the files' names."""
    paths = [path for path in FOLDER.glob("test_*.py") if files is None or path.stem in files]
    names = set() if files else {f"tests/{path.name}" for path in paths}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                names.add(node.name)
    return frozenset(names)


def table() -> str:
    """Format all suites in Markdown, after a line of counts."""
    lines, numbers = [], [0, 0, 0]
    for suite, own in SUITES.items():
        run = RUN_AS_PUBLISHED.get(suite, [])
        checks = {check: own.get(check, Entry()) for check in sorted({*own, *run})}
        lines += [
            "",
            f"## {suite}",
            "",
            "| check | covered by | reason if not or only partly applicable |",
            "| --- | --- | --- |",
        ]
        for check, entry in checks.items():
            # A check that passes because it does not apply has a reason and no test.
            is_run = check in run and (entry == Entry() or bool(entry.tests))
            numbers[0 if is_run else 1 if entry.tests else 2] += 1
            tests = ["as published"] * is_run + list(entry.tests)
            lines.append(f"| {check} | {', '.join(tests)} | {entry.reason} |")
    return "\n".join([summary(*numbers), *lines]) + "\n"


def summary(run: int, covered_otherwise: int, not_applicable: int) -> str:
    """Format the line of counts of the table."""
    total = run + covered_otherwise + not_applicable
    return (
        f"{total} checks: {run} run as published, {covered_otherwise} covered only by tests of this project, "
        f"{not_applicable} not applicable."
    )


if __name__ == "__main__":
    sys.stdout.write(table())
