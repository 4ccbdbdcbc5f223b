"""DeepSeek-V3 and its sizes as inputs of the planner's formulas, for tests of what both count."""

from dsmini import ModelConfig
from dsmini.planner.quantities.inputs import ModelInputs
from tests.helpers.configs import released

V3 = released("deepseek-v3")


def model_of(config: ModelConfig) -> ModelInputs:
    return ModelInputs.of(config, "a test")
