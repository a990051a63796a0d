"""What a forked `scorer` finds imported already: see tests.lib.command."""
# ruff: noqa: F401

import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.gpt2.modeling_gpt2
import transformers.tokenization_utils_tokenizers

import scorer.console
import scorer.engines.packed
import scorer.runs.run
import scorer.selection.export
