"""lrnn: pretrain linear RNNs that can track state.

Importing the package registers its model with transformers, so that `AutoModelForCausalLM.from_pretrained` loads an
exported folder with this code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lrnn.model.configuration_lrnn import LrnnConfig
from lrnn.model.modeling_lrnn import LrnnForCausalLM, LrnnModel

__all__ = ["LrnnConfig", "LrnnForCausalLM", "LrnnModel"]
__version__ = "0.1.0"

AutoConfig.register(LrnnConfig.model_type, LrnnConfig, exist_ok=True)
AutoModel.register(LrnnConfig, LrnnModel, exist_ok=True)
AutoModelForCausalLM.register(LrnnConfig, LrnnForCausalLM, exist_ok=True)
