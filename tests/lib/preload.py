"""What a forked `scorer` finds imported already: see tests.lib.command."""
# ruff: noqa: F401

import gc

import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.gpt2.modeling_gpt2
import transformers.tokenization_utils_tokenizers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import scorer.console
import scorer.engines.packed
import scorer.runs.run
import scorer.selection.export

get_checkpoint_conversion_mapping("gpt2")  # compiles the expressions of all architectures
gc.freeze()  # a fork collects none of this
