"""Rewardsmith: reinforcement fine-tuning that you run yourself.

These are the public names. Importing them loads neither torch nor the server (a test reads `sys.modules`).
"""

from rewardsmith.client import Rewardsmith
from rewardsmith.config import (
    GRPOConfig,
    OptimizerConfig,
    SamplerCorrectionConfig,
    SamplingParamsConfig,
    SchedulerConfig,
)
from rewardsmith.errors import (
    APIError,
    ConfigError,
    DatasetError,
    FinetuningError,
    RequestError,
    ResponseError,
    RewardsmithError,
    RewardSourceError,
    ServerError,
    ServerUnreachable,
)
from rewardsmith.rehearsal import test_rewards
from rewardsmith.reward_config import RewardFunction, RewardFunctionsConfig, RewardFunctionsRuntimeConfig

__version__ = "0.1.0"

__all__ = [
    "APIError",
    "ConfigError",
    "DatasetError",
    "FinetuningError",
    "GRPOConfig",
    "OptimizerConfig",
    "RequestError",
    "ResponseError",
    "RewardFunction",
    "RewardFunctionsConfig",
    "RewardFunctionsRuntimeConfig",
    "RewardSourceError",
    "Rewardsmith",
    "RewardsmithError",
    "SamplerCorrectionConfig",
    "SamplingParamsConfig",
    "SchedulerConfig",
    "ServerError",
    "ServerUnreachable",
    "__version__",
    "test_rewards",
]
