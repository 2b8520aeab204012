"""What transformers' own suites check of every model, check by check: the test that holds it for ours, or why not.

`python -m tests.common_checks` prints the table in Markdown. The names are those of transformers 5's
`tests/test_modeling_common.py`, `test_backbone_common.py`, `test_configuration_common.py`, `test_training_mixin.py`
and `peft_integration/test_peft_integration.py`, and of checks of its release 4 that users still look for.
"""

import ast
import functools
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
OWN_FILES = ("test_common", "test_attention", "test_gradients", "test_doors")
NO_GPU = "needs accelerators, which the suite does without; "
NO_FLASH = (
    "flash attention takes no masks of the kind that masked attention needs (a query sees the inside of its mask), so "
    "it is refused: test_implementations_that_take_no_masks_are_refused"
)
NO_TOKENS = "the input is an image; words come as text or as embeddings, and the text tower is frozen"
NO_DEEPSPEED = "there is no token table to resize, and DeepSpeed is not in the supported set"
NO_MEDIA = "there is no such modality"
TEXT_FEATURES = "tests/test_modeling.py"
IMAGE_FEATURES = "there is no `get_image_features`; GKCModel and CLIPResNetVisionModel give features as their output"


class Entry(NamedTuple):
    """Tests that hold a check, by name; or the reason why there is none; a partly held check has both."""

    tests: tuple[str, ...] = ()
    reason: str = ""


def held(*tests: str, but: str = "") -> Entry:
    return Entry(tests, but)


def none(reason: str) -> Entry:
    return Entry((), reason)


MODELING = {
    "test_num_layers_is_small": held("test_model_is_small"),
    "test_model_is_small": held("test_model_is_small"),
    "test_save_load": held("test_save_load"),
    "test_from_pretrained_no_checkpoint": held("test_from_pretrained_no_checkpoint"),
    "test_keep_in_fp32_modules_exist": none(
        "no module asks to be kept in fp32: what needs it is computed in fp32 where it is"
    ),
    "test_keep_in_fp32_modules": held("test_half_precision_is_near_single", but="no module asks to be kept in fp32"),
    "test_save_load_keys_to_ignore_on_save": held("test_every_weight_is_saved_under_its_name"),
    "test_load_contiguous_weights": held("test_load_contiguous_weights"),
    "test_gradient_checkpointing_backward_compatibility": held("test_gradient_checkpointing_by_configuration"),
    "test_gradient_checkpointing_enable_disable": held("test_gradient_checkpointing_enable_disable"),
    "test_peft_gradient_checkpointing_enable_disable": held(
        "test_gradient_checkpointing_enable_disable", "test_lora_trains_under_gradient_checkpointing"
    ),
    "test_enable_input_require_grads": held("test_enable_input_require_grads"),
    "test_enable_input_require_grads_with_gradient_checkpointing": held(
        "test_lora_trains_under_gradient_checkpointing"
    ),
    "test_can_init_all_missing_weights": held("test_can_init_all_missing_weights"),
    "test_init_weights_can_init_buffers": held("test_init_weights_can_init_buffers"),
    "test_all_tensors_are_parameter_or_buffer": held("test_all_tensors_are_parameter_or_buffer"),
    "test_torch_save_load": held("test_torch_save_load"),
    "test_determinism": held("test_determinism"),
    "test_batching_equivalence": held("tests/test_batching.py"),
    "test_model_forward_default_config_values": held("test_model_forward_default_config_values"),
    "test_training": held("test_training"),
    "test_training_gradient_checkpointing": held(
        "test_training_gradient_checkpointing", "test_recomputation_never_counts_a_batch_twice"
    ),
    "test_training_gradient_checkpointing_use_reentrant_false": held("test_training_gradient_checkpointing"),
    "test_training_gradient_checkpointing_use_reentrant_true": held("test_training_gradient_checkpointing"),
    "test_attention_outputs": held(
        "test_attention_outputs",
        "test_weights_of_an_attention_that_has_none_are_left_out",
        "test_cross_attention_stays_inside_the_mask_that_was_predicted_before",
    ),
    "test_hidden_states_output": held(
        "test_hidden_states_output",
        "test_hidden_states_change_no_result",
        "test_states_equal_those_of_mask2former",
        "test_head_gives_the_states_of_the_image_path",
        "test_images_of_several_sizes_have_no_common_states",
        "test_states_have_the_size_of_the_images_not_of_the_padding",
        "test_training_looks_at_the_padding_too",
    ),
    "test_retain_grad_hidden_states_attentions": held("test_retain_grad_hidden_states_attentions"),
    "test_feed_forward_chunking": none("feed-forward layers are not chunked: memory is in the maps, not there"),
    "test_resize_position_vector_embeddings": none(
        "positions are computed for any size, or resized in CLIP's tower: tests/test_clip_resnet.py"
    ),
    "test_resize_tokens_embeddings": held("test_resize_tokens_embeddings_is_refused", but=NO_TOKENS),
    "test_resize_tokens_embeddings_with_deepspeed": none(NO_DEEPSPEED),
    "test_resize_tokens_embeddings_with_deepspeed_multi_gpu": none(NO_DEEPSPEED),
    "test_resize_embeddings_untied": held("test_resize_tokens_embeddings_is_refused", but=NO_TOKENS),
    "test_resize_embeddings_untied_with_deepspeed": none(NO_DEEPSPEED),
    "test_resize_embeddings_untied_with_deepspeed_multi_gpu": none(NO_DEEPSPEED),
    "test_model_get_set_embeddings": held("test_get_and_set_input_embeddings"),
    "test_model_main_input_name": held("test_forward_signature"),
    "test_model_base_model_prefix": held("test_base_model_prefix"),
    "test_correct_missing_keys": held("test_correct_missing_keys"),
    "test_can_use_safetensors": held("test_can_use_safetensors"),
    "test_load_save_without_tied_weights": held(
        "test_every_weight_is_saved_under_its_name", but="no weights are tied"
    ),
    "test_tied_weights_keys": held("test_every_weight_is_saved_under_its_name", but="no weights are tied"),
    "test_model_weights_reload_no_missing_tied_weights": held("test_all_missing_weights_are_reported_and_initialised"),
    "test_model_outputs_equivalence": held("test_model_outputs_equivalence", "test_return_dict_of_the_configuration"),
    "test_inputs_embeds": none(NO_TOKENS + "; `class_embeds` is the counterpart: tests/test_modeling.py"),
    "test_inputs_embeds_matches_input_ids": none(
        NO_TOKENS + "; `class_embeds` is the counterpart: tests/test_modeling.py"
    ),
    "test_multi_gpu_data_parallel_forward": none(NO_GPU + "training uses accelerate: tests/test_distributed.py"),
    "test_disk_offload_bin": none(
        "pickled weights are read only when asked for by name; safetensors are offloaded below"
    ),
    "test_disk_offload_safetensors": held("test_offloaded_weights_give_the_same_result"),
    "test_cpu_offload": held("test_weights_kept_in_memory_elsewhere_give_the_same_result"),
    "test_model_parallelism": held(
        "test_no_layer_is_split_between_devices", but=NO_GPU + "which layers must stay together is held"
    ),
    "test_problem_types": none("no classification or regression head"),
    "test_load_with_mismatched_shapes": held("test_weights_of_another_shape"),
    "test_can_load_ignoring_mismatched_shapes": held("test_weights_of_another_shape"),
    "test_flash_attn_kernels_inference_equivalence": none(NO_FLASH),
    "test_flash_attn_kernels_mps_inference_equivalence": none(NO_FLASH),
    "test_flash_attn_2_inference_equivalence": none(NO_FLASH),
    "test_flash_attn_2_inference_equivalence_right_padding": none(NO_FLASH),
    "test_flash_attn_3_inference_equivalence": none(NO_FLASH),
    "test_flash_attn_3_inference_equivalence_right_padding": none(NO_FLASH),
    "test_flash_attn_2_can_dispatch_composite_models": held(
        "test_implementations_that_take_no_masks_are_refused", but=NO_FLASH
    ),
    "test_flash_attn_3_can_dispatch_composite_models": none(NO_FLASH),
    "test_flash_attn_2_fp32_ln": none(NO_FLASH),
    "test_flash_attn_2_can_compile_with_attention_mask_None_without_graph_break": none(NO_FLASH),
    "test_flash_attn_2_from_config": none(NO_FLASH),
    "test_flash_attn_3_from_config": none(NO_FLASH),
    "test_attn_implementation_composite_models": held("test_attn_implementation_composite_models"),
    "test_sdpa_can_dispatch_non_composite_models": held("test_attn_implementation_at_loading"),
    "test_sdpa_can_dispatch_composite_models": held(
        "test_attn_implementation_at_loading", "test_attn_implementation_composite_models"
    ),
    "test_eager_matches_sdpa_inference": held(
        "test_eager_matches_sdpa_inference",
        "test_eager_matches_sdpa_inference_in_half_precision",
        "test_eager_matches_sdpa_gradients",
        "test_query_whose_mask_is_empty_sees_everything",
    ),
    "test_eager_matches_batched_and_grouped_inference": none("there are no experts"),
    "test_sdpa_can_dispatch_on_flash": none(NO_FLASH),
    "test_sdpa_can_compile_dynamic": held(
        "test_image_path_compiles_without_graph_break",
        but=NO_GPU + "and each image size is compiled on its own, since sizes decide the shapes of all maps",
    ),
    "test_sliding_window_mask": none("attention has no window: masks decide what is seen"),
    "test_torch_compile_for_training": held("test_image_path_compiles_without_graph_break"),
    "test_torch_export": held("test_torch_export"),
    "test_flex_attention_with_grads": held(
        "test_implementations_that_take_no_masks_are_refused", but="masks change at every layer with what is predicted"
    ),
    "test_generation_tester_mixin_inheritance": held("test_nothing_is_generated"),
    "test_can_be_initialized_on_meta": held("test_can_be_initialized_on_meta"),
    "test_can_load_with_device_context_manager": held(
        "test_device_of_the_context_is_respected", but=NO_GPU + "held on CPU"
    ),
    "test_can_load_with_global_device_set": held(
        "test_device_of_the_context_is_respected", but=NO_GPU + "held on CPU"
    ),
    "test_cannot_load_with_meta_device_context_manager": held("test_cannot_load_with_meta_device_context_manager"),
    "test_config_attn_implementation_setter": held("test_config_attn_implementation_setter"),
    "test_internal_model_config_and_subconfig_are_same": held("test_internal_model_config_and_subconfig_are_same"),
    "test_can_set_attention_dynamically": held(
        "test_can_set_attention_dynamically", "test_registered_attention_is_used"
    ),
    "test_can_set_attention_dynamically_composite_model": held("test_can_set_attention_dynamically"),
    "test_bc_torch_dtype": held("test_dtype_at_loading"),
    "test_tp_plan_matches_params": none("no plan for tensor parallelism: the largest model has 60 M parameters"),
    "test_reverse_loading_mapping": held(
        "test_save_load", but="our weights are never renamed; transformers' backbones rename theirs both ways"
    ),
    "test_can_load_from_already_mapped_keys": held("test_save_load", but="our weights are never renamed"),
    "test_get_text_features_output": held(TEXT_FEATURES),
    "test_get_text_features_hidden_states": held(TEXT_FEATURES),
    "test_get_text_features_attentions": held(TEXT_FEATURES),
    "test_get_image_features_output": none(IMAGE_FEATURES),
    "test_get_image_features_hidden_states": none(IMAGE_FEATURES),
    "test_get_image_features_attentions": none(IMAGE_FEATURES),
    **{
        f"test_get_{kind}_features_{what}": none(NO_MEDIA)
        for kind in ("audio", "video")
        for what in ("output", "hidden_states", "attentions")
    },
    "test_capture_outputs_decorator": none(
        "states are passed, not captured by hooks, so that the model can be pickled"
    ),
}

RELEASE_4 = {
    "test_forward_signature": held("test_forward_signature"),
    "test_initialization": held("test_can_init_all_missing_weights", but="published starts: tests/test_modeling.py"),
    "test_headmasking": none("removed from transformers 5; a mask per head has no use here"),
    "test_head_pruning": none("removed from transformers 5; heads are not pruned"),
    "test_torchscript_simple": none("removed from transformers 5 in favour of export"),
    "test_torch_fx": none("removed from transformers 5 in favour of compile and export"),
    "test_save_load_low_cpu_mem_usage": held("test_shards_and_low_memory_give_the_same_weights"),
    "test_save_load_fast_init_to_base": held("test_correct_missing_keys"),
    "test_save_load_fast_init_from_base": held("test_correct_missing_keys"),
    "test_matched_shapes_have_loaded_weights_when_some_mismatched_shapes_exist": held("test_weights_of_another_shape"),
    "test_mismatched_shapes_have_properly_initialized_weights": held("test_weights_of_another_shape"),
    "test_load_with_torch_dtype_auto": held("test_dtype_at_loading"),
    "test_checkpoint_sharding_local": held("test_shards_and_low_memory_give_the_same_weights"),
    "test_default_dtype": held("test_default_dtype_is_respected"),
}

BACKBONE = {
    "test_config": held("test_stages_by_configuration", but="the default is all four stages, not the last alone"),
    "test_forward_signature": held("test_forward_signature"),
    "test_config_save_pretrained": held("test_stages_that_are_selected"),
    "test_channels": held("test_stages_that_are_selected"),
    "test_create_from_modified_config": held("test_stages_that_are_selected"),
    "test_backbone_common_attributes": held("test_backbone_common_attributes"),
    "test_backbone_outputs": held("test_hidden_states_output", "test_tower_and_backbone_share_a_checkpoint"),
    "test_backbone_stage_selection": held("test_stages_that_are_selected"),
}

CONFIGURATION = {
    "create_and_test_config_common_properties": none(
        "hidden_size and num_attention_heads are there; one number of layers would not say of which part"
    ),
    "create_and_test_config_to_json_string": held("test_round_trips"),
    "create_and_test_config_to_json_file": held("test_round_trips"),
    "create_and_test_config_from_and_save_pretrained": held("test_round_trips"),
    "create_and_test_config_from_and_save_pretrained_subfolder": held("test_round_trips"),
    "create_and_test_config_from_and_save_pretrained_composite": held(
        "test_text_tower_is_read_from_a_checkpoint_of_the_whole"
    ),
    "create_and_test_config_with_num_labels": held("test_labels"),
    "check_config_can_be_init_without_params": held("test_defaults_make_a_configuration"),
    "check_config_arguments_init": held("test_values_given_while_loading_replace_those_in_the_file"),
    "create_and_test_config_from_pretrained_custom_kwargs": held(
        "test_values_given_while_loading_replace_those_in_the_file"
    ),
    "test_push_to_hub_dynamic_config": held("test_classes_of_ones_own", but="no network: tests/test_remote_code.py"),
}

TRAINING_AND_PEFT = {
    "test_training_overfit": held("test_training_overfit", "test_training_mode_spares_frozen_parts"),
    "test_peft_from_pretrained": held("test_lora_is_saved_loaded_and_merged"),
    "test_peft_state_dict": held("test_only_adapters_of_the_mask_decoder_train"),
    "test_peft_save_pretrained": held("test_lora_is_saved_loaded_and_merged"),
    "test_peft_enable_disable_adapters": held("test_adapters_of_transformers_itself"),
    "test_peft_add_adapter": held("test_adapters_of_transformers_itself"),
    "test_peft_add_adapter_modules_to_save": held("test_lora_with_a_head_that_trains_whole"),
    "test_peft_add_adapter_training_gradient_checkpointing": held("test_lora_trains_under_gradient_checkpointing"),
    "test_peft_add_multi_adapter": none(
        "several adapters at once are PEFT's own matter; the model takes no part in it"
    ),
    "test_peft_load_adapter_training_inference_mode": held("test_only_adapters_of_the_mask_decoder_train"),
    "test_peft_from_pretrained_kwargs": none("quantised weights need bitsandbytes, which is not in the supported set"),
}

BEYOND = {
    "a copy and a pickle are whole": held(
        "test_copies_are_whole_and_apart",
        but="transformers' Swin hooks itself, so a model on it is copied, not pickled",
    ),
    "several threads use one model": held("test_several_threads_share_a_model"),
    "autocast, float16 and bfloat16 are near float32": held("test_half_precision_is_near_single"),
    "inference mode leaves the model trainable": held("test_inference_mode_leaves_the_model_trainable"),
    "all stages in training": held("test_feature_extraction_in_training_mode_gives_all_stages"),
    "variants and subfolders": held("test_variants_and_subfolders"),
    "device_map='auto' with little memory": held("test_automatic_device_map"),
    "parts on several devices": held("test_parts_may_stand_on_different_devices"),
    "graphs of the default compiler": held("test_image_path_compiles_with_inductor", but="takes minutes: on request"),
    "adapters miss the text tower by pattern only": held("test_projections_of_the_text_tower_have_the_same_names"),
    "this list has no gap": held("test_every_check_is_held_or_has_a_reason", "test_every_common_test_is_in_the_list"),
}

SUITES = {
    "Models": MODELING,
    "Models, release 4": RELEASE_4,
    "Backbones": BACKBONE,
    "Configurations": CONFIGURATION,
    "Training and PEFT": TRAINING_AND_PEFT,
    "Beyond these suites": BEYOND,
}


def entries() -> Iterator[tuple[str, Entry]]:
    """Every check of every suite."""
    for checks in SUITES.values():
        yield from checks.items()


@functools.cache
def defined_tests(files: Collection[str] | None = None) -> frozenset[str]:
    """Names of the test functions in `files`; by default in all of this folder, with its test files themselves."""
    paths = [path for path in FOLDER.glob("test_*.py") if files is None or path.stem in files]
    names = set() if files else {f"tests/{path.name}" for path in paths}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                names.add(node.name)
    return frozenset(names)


def table() -> str:
    """All suites in Markdown, after a line of numbers."""
    everything = [entry for _, entry in entries()]
    number_held = sum(bool(entry.tests) for entry in everything)
    lines = [f"{len(everything)} checks: {number_held} held, {len(everything) - number_held} not applicable."]
    for suite, checks in SUITES.items():
        lines += [
            "",
            f"## {suite}",
            "",
            "| check | held by | not applicable, or in part, because |",
            "| --- | --- | --- |",
        ]
        lines += [f"| {check} | {', '.join(entry.tests)} | {entry.reason} |" for check, entry in checks.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
