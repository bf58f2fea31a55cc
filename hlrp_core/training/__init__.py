"""Stage 2 for any iterable of FoundationBatch: training on accelerate, and evaluation of codes."""

from hlrp_core.training.batches import BatchStream, SeekableBatches
from hlrp_core.training.code_training import CodeTrainingResult, train_codes
from hlrp_core.training.config import CodeTrainingConfig
from hlrp_core.training.evaluation import CodeEvaluation, count_codes, evaluate_codes, evaluate_sources
from hlrp_core.training.mixing import MixedBatches

__all__ = [
    "BatchStream",
    "CodeEvaluation",
    "CodeTrainingConfig",
    "CodeTrainingResult",
    "MixedBatches",
    "SeekableBatches",
    "count_codes",
    "evaluate_codes",
    "evaluate_sources",
    "train_codes",
]
