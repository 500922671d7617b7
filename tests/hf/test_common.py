"""transformers' own common tests for a small VILA: model, generation, configuration.

What does not apply is named with its reason. The tests of ``generate`` run where transformers' sources are given.
"""

from __future__ import annotations

import os
import unittest

import torch
from transformers import LlamaConfig, SiglipVisionConfig

from megatron_vila.hf import VilaConfig, VILAForConditionalGeneration, VILAModel
from megatron_vila.hf.vila.configuration import IMAGE_TOKEN_ID
from tests.hf.common_tests import common

modeling = common("test_modeling_common")
configuration = common("test_configuration_common")
generation = common("generation.test_utils")

ALL = os.environ.get("MEGATRON_VILA_TEST_ALL") == "1"

# What kind of model a class is, the tests look up by its name.
modeling.MODEL_MAPPING_NAMES = {**modeling.MODEL_MAPPING_NAMES, "vila": "VILAModel"}
modeling.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = {
    **modeling.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "vila": "VILAForConditionalGeneration"
}  # fmt: skip

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": True,
}


class Tester:
    """A small model and its inputs: a picture in each of seven sequences."""

    batch_size, seq_length, num_image_tokens = 7, 11, 4
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32
    is_training = pictures = True

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return VilaConfig(
            text_config=LlamaConfig(**TEXT),
            vision_config=SiglipVisionConfig(**VISION),
            megatron_vila={"projector_token_order": "row_major"},
        )

    def prepare_config_and_inputs_for_common(self):
        ids = modeling.ids_tensor([self.batch_size, self.seq_length], 96) + 3
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.pictures:
            ids[:, : self.num_image_tokens] = IMAGE_TOKEN_ID
            inputs["pixel_values"] = modeling.floats_tensor([self.batch_size, 3, 56, 56])
        return self.get_config(), inputs


# What does not apply, by name, with the reason.
ONE_FORM = "weights have one form in files, that of the exported folders; another is refused"
NOT_APPLICABLE = {
    "test_can_load_from_already_mapped_keys": ONE_FORM,
    "test_model_weights_reload_no_missing_tied_weights": "a file without the model's weights is refused",
    "test_init_weights_can_init_buffers": "weights behind the selected layer are carried as buffers; they are in every file",
    "test_model_rope_scaling_from_config_1_dynamic": "the trainer has linear scaling only; another is refused",
    "test_model_rope_scaling_from_config_2_yarn": "the trainer has linear scaling only; another is refused",
    "test_sdpa_can_dispatch_composite_models": "the tower is a part of training, no PreTrainedModel; its attention is tested in "
    "test_generation.py",
    "test_generate_from_random_inputs_embeds": "places of pictures without pictures are refused",
}


class ModelTest(modeling.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (VILAModel, VILAForConditionalGeneration)
    all_generative_model_classes = (VILAForConditionalGeneration,)
    additional_model_inputs = ("pixel_values",)
    _is_composite = True

    def setUp(self):
        if reason := NOT_APPLICABLE.get(self._testMethodName):
            self.skipTest(reason)
        if not ALL and ("_fp16_" in self._testMethodName or "_bf16_" in self._testMethodName):
            self.skipTest("by hand, with MEGATRON_VILA_TEST_ALL=1")
        self.model_tester = Tester(self)
        self.config_tester = configuration.ConfigTester(self, config_class=VilaConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_resize_tokens_embeddings(self):
        self.model_tester.pictures = False  # it makes all ids smaller than the table
        super().test_resize_tokens_embeddings()

    def test_resize_embeddings_untied(self):
        self.model_tester.pictures = False
        super().test_resize_embeddings_untied()
