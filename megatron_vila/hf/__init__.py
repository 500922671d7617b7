"""VILA for transformers: ``import megatron_vila.hf`` registers configuration, model and processor with the Auto classes.

After that, ``AutoConfig``, ``AutoModelForCausalLM`` (also ``AutoModel`` and ``AutoModelForImageTextToText``) and
``AutoProcessor`` load folders of the model types ``vila``, ``llava_llama`` and ``nvila_lite`` without
``trust_remote_code``. Nothing here needs Megatron-Core.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from megatron_vila.hf.vila.configuration import OTHER_TYPES, VilaConfig, VilaConfigError
from megatron_vila.hf.vila.modeling import VILAForConditionalGeneration, VILAModel
from megatron_vila.hf.vila.processing import VilaProcessor

__all__ = ["VILAForConditionalGeneration", "VILAModel", "VilaConfig", "VilaConfigError", "VilaProcessor"]

_configs: list[type[VilaConfig]] = [VilaConfig, *OTHER_TYPES]
for _config in _configs:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoProcessor.register(_config, VilaProcessor, exist_ok=True)
AutoModel.register(VilaConfig, VILAModel, exist_ok=True)
for _auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto.register(VilaConfig, VILAForConditionalGeneration, exist_ok=True)
