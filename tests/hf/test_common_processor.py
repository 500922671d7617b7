"""transformers' own common tests for the processor. What does not apply is named with its reason."""

from __future__ import annotations

import unittest

from megatron_vila.hf import VilaProcessor
from tests.data.material import byte_level_tokenizer
from tests.hf.common_tests import common
from tests.hf.test_processing import processor_of

processing = common("test_processing_common")

# Settings of the run, which no default stands for.
SETTINGS = ("image_size", "tokens_per_frame", "image_separator_ids", "frame_separator_ids", "num_frames", "fps", "image_aspect")
NOT_APPLICABLE = {
    "test_apply_chat_template_assistant_mask": "masks of what an assistant writes are refused: give prompts with completions",
    "test_tokenizer_decode_defaults": "a processor is not made of a tokenizer alone",
    "test_init_arguments_not_in_processor_kwargs": "num_frames and fps are settings of the run and options of a call",
}


class ProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VilaProcessor

    def setUp(self):
        if reason := NOT_APPLICABLE.get(self._testMethodName):
            self.skipTest(reason)

    @classmethod
    def _setup_tokenizer(cls):
        return byte_level_tokenizer("qwen2")

    @staticmethod
    def prepare_processor_dict():
        made = processor_of(byte_level_tokenizer("qwen2"))
        return {name: getattr(made, name) for name in (*SETTINGS, "max_positions", "media_format")}
